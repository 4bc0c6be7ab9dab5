"""The toy models and tasks are worth sweeping. Minutes long: `make test-slow`."""

from __future__ import annotations

from typing import Any

import pytest

from search_spaces.matrix import PRESETS
from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.config import SweepConfig
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.toy_models import TOY_MODELS, train_toy_models
from tune_sparse.sweep.plan import make_plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict[str, Any]]:
    """{(model, task, method): metrics} of the dense and the half-pruned sparse-to-sparse cells."""
    train_toy_models(TOY_MODELS)
    folder = tmp_path_factory.mktemp("results")
    axes = {"sparsities": (0.0, 0.5), "methods": ("unstructured", "random"), "modes": ("sparse-to-sparse",)}
    plan = make_plan(SweepConfig.from_names(PRESETS["toy"] | axes | {"results_dir": folder}))
    ledger, worker = Ledger(folder), WorkerCache()
    found = {}
    for run in plan.runs.values():
        for _ in run_cell(run, ledger, worker):
            pass
        record = ledger.record(run.run_id)
        assert record is not None
        assert record.status == "done", record.error
        found[run.cell.model, run.cell.task, run.cell.method] = record.metrics
    assert len(found) == 18
    return found


@pytest.mark.parametrize("task", ["boolq", "hellaswag", "gsm8k"])
@pytest.mark.parametrize("model", TOY_MODELS)
def test_a_task_is_learned_and_pruning_it_makes_a_difference(
    metrics: dict[tuple[str, str, str], dict[str, Any]], model: str, task: str
) -> None:
    dense, magnitude, random = (metrics[model, task, method] for method in ("none", "unstructured", "random"))
    assert dense["accuracy"] >= 0.85
    assert magnitude["accuracy_before_tuning"] > random["accuracy_before_tuning"]
    assert magnitude["accuracy"] > magnitude["accuracy_before_tuning"]
    assert magnitude["accuracy"] > random["accuracy"]
