from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import done_record, make_cell, make_run
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.matrix import PRESETS
from tune_sparse.config import BACKENDS, Cerebras, SweepConfig
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import SweepRecord
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import Checkpoint
from tune_sparse.models.dims import ModelDims
from tune_sparse.sweep.examples import Examples
from tune_sparse.sweep.forecast import longest_first
from tune_sparse.sweep.plan import Plan, requested_cells, split_blocks


def config(**names: Any) -> SweepConfig:
    return SweepConfig.from_names(PRESETS["toy"] | names)


def test_split_keeps_a_model_and_task_on_one_backend_and_both_on_all_models_and_tasks() -> None:
    cells = requested_cells(config(backend="split"))
    assert len(cells) == 360
    backends: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        backends.setdefault((cell.model, cell.task), set()).add(cell.backend)
    assert backends == {
        ("tiny-llama", "boolq"): {"torch"},
        ("tiny-llama", "hellaswag"): {"cerebras"},
        ("tiny-llama", "gsm8k"): {"torch"},
        ("tiny-mistral", "boolq"): {"cerebras"},
        ("tiny-mistral", "hellaswag"): {"torch"},
        ("tiny-mistral", "gsm8k"): {"cerebras"},
    }


@given(st.floats(0.01, 0.99), st.integers(1, 12), st.integers(1, 10))
def test_split_gives_cerebras_its_share_of_the_blocks(share: float, models: int, tasks: int) -> None:
    many = SweepConfig(
        models=tuple(f"model{n}" for n in range(models)),
        tasks=tuple(f"task{n}" for n in range(tasks)),
        backend=("split",),
        cerebras=Cerebras(cerebras_share=share),
    )
    given_to = list(split_blocks(many).values())
    assert len(given_to) == models * tasks
    assert given_to.count("cerebras") == int(len(given_to) * share)


def test_both_is_every_cell_on_every_backend() -> None:
    assert config(backend="both").backend == BACKENDS
    cells = requested_cells(config(backend="both"))
    assert len(cells) == 720
    assert {replace(cell, backend="torch") for cell in cells} == set(requested_cells(config()))


def runs() -> list[Run]:
    """Two seeds of each model and task, in the order of a matrix."""
    return [
        make_run(make_cell(model=model, task=task, seed=seed))
        for model in ("small", "large")
        for task in ("boolq", "gsm8k")
        for seed in (0, 1)
    ]


@pytest.fixture
def plan() -> Plan:
    dims = ModelDims(64, 2, 4, 2, 16, 128, 500, None, 256)
    checkpoints = {
        "small": Checkpoint("small", Path("small"), "s" * 64, dims),
        "large": Checkpoint("large", Path("large"), "l" * 64, replace(dims, num_layers=9)),
    }
    record = SweepRecord("sweep", 0.0, {}, ())
    config, own = SweepConfig(models=("small", "large")), {run.run_id: run for run in runs()}
    return Plan(config, record, own, checkpoints, Examples(None, {}, {}, None))


def names(ordered: list[Run]) -> list[str]:
    return [f"{run.cell.model} {run.cell.task} {run.cell.seed}" for run in ordered]


def test_the_larger_model_comes_first_where_nothing_was_measured(plan: Plan, tmp_path: Path) -> None:
    assert names(longest_first(plan, Ledger(tmp_path), runs())) == [
        *("large boolq 0", "large boolq 1", "large gsm8k 0", "large gsm8k 1"),
        *("small boolq 0", "small boolq 1", "small gsm8k 0", "small gsm8k 1"),
    ]


def test_the_longest_measured_comes_first_and_blocks_stay_together(plan: Plan, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    seconds = {"small gsm8k 0": 40.0, "large boolq 0": 30.0, "small boolq 1": 20.0, "large gsm8k 1": 10.0}
    for run, name in zip(runs(), names(runs()), strict=True):
        if name in seconds:
            ledger.write_record(
                run,
                replace(done_record(run), measured=dict.fromkeys(("trial_seconds", "train_seconds"), seconds[name])),
            )
    left = [run for run, name in zip(runs(), names(runs()), strict=True) if name not in seconds]
    assert names(longest_first(plan, ledger, left)) == [
        *("small gsm8k 1", "large boolq 1", "small boolq 0", "large gsm8k 0"),
    ]
    everything = names(longest_first(plan, ledger, runs()))
    assert everything == [
        *("small gsm8k 0", "small gsm8k 1", "large boolq 0", "large boolq 1"),
        *("small boolq 0", "small boolq 1", "large gsm8k 0", "large gsm8k 1"),
    ]
