"""Budgets follow from the device and the user, hold every example, and are those of a run that goes on or repeats."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from factories import finished, tiny_run

from trainables import budgets as device_budgets
from trainables import training
from trainables.budgets import check_budgets, run_budgets
from trainables.pipeline import run_cell
from trainables.rerun import rerun
from trainables.worker import WorkerCache
from tune_sparse.config import BudgetOptions, SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.evaluation.memory import GIB
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.training.budgets import CPU_BUDGETS, Budgets, cpu_budgets

SMALL = BudgetOptions(micro_batch_tokens=150, scoring_tokens=300, generation_tokens=400)


def test_a_user_sets_what_they_like_of_the_budgets() -> None:
    assert CPU_BUDGETS.changed_by(BudgetOptions()) == CPU_BUDGETS
    changed = CPU_BUDGETS.changed_by(BudgetOptions(scoring_tokens=100, activation_checkpointing="always"))
    assert changed == replace(CPU_BUDGETS, scoring_tokens=100, activation_checkpointing=True)
    assert changed.changed_by(BudgetOptions(activation_checkpointing="never")).activation_checkpointing is False


def test_budgets_come_back_from_records_and_as_options() -> None:
    budgets = Budgets(1, 2, 3, True, True)
    assert Budgets.from_record(budgets.as_record()) == budgets
    small = CPU_BUDGETS.changed_by(SMALL)
    assert CPU_BUDGETS.changed_by(small.as_options()) == small


def test_a_cpu_has_fixed_budgets_with_room_for_one_example() -> None:
    assert cpu_budgets(256) == CPU_BUDGETS
    assert cpu_budgets(4096) == replace(CPU_BUDGETS, micro_batch_tokens=4096)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch_tokens": 1}, "micro_batch_tokens must be at least 2 or none, got 1"),
        ({"generation_tokens": 256}, "generation_tokens must hold a prompt and an answer of max_new_tokens = 256, got"),
        ({"activation_checkpointing": "allways"}, "unknown activation_checkpointing 'allways'. Did you mean 'always'"),
    ],
)
def test_budgets_that_hold_nothing_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SweepConfig.from_names({"models": "m"} | values)


@pytest.mark.parametrize(
    ("task", "options", "name"),
    [
        ("boolq", BudgetOptions(micro_batch_tokens=20), "micro_batch_tokens"),
        ("hellaswag", BudgetOptions(scoring_tokens=10), "scoring_tokens"),
        ("gsm8k", BudgetOptions(generation_tokens=20), "generation_tokens"),
    ],
)
def test_a_budget_smaller_than_one_example_is_refused_by_name(
    task: str, options: BudgetOptions, name: str, llama: Path
) -> None:
    run, worker = replace(tiny_run(llama, task=task), budgets=options), WorkerCache()
    loaded = worker.model(run)
    with pytest.raises(InputError, match=rf"{name} must hold the longest example, of \d+ tokens, got \d+\. Raise --"):
        check_budgets(run_budgets(run, loaded.dims), worker.examples(run, loaded), run.protocol.max_new_tokens)


def test_a_model_that_is_too_large_is_refused_before_it_is_read(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_budgets, "gpu_memory_bytes", lambda: GIB)
    monkeypatch.setattr(device_budgets, "gpu_share", lambda: 1.0)
    worker = WorkerCache()
    record = finished(tiny_run(llama), Ledger(tmp_path), worker)
    assert record.error is not None
    assert record.error["class"] == "TooLargeError"
    assert worker.loads == 0


def test_a_run_is_the_same_under_other_budgets_but_for_rounding(llama: Path, tmp_path: Path) -> None:
    run = tiny_run(llama, global_batch_size=8)
    other = replace(run, budgets=SMALL)
    assert run.identity == other.identity
    first, second = (finished(r, Ledger(tmp_path / str(i))) for i, r in enumerate((run, other)))
    assert first.measured["budgets"] == CPU_BUDGETS.as_record()
    assert second.measured["budgets"] == CPU_BUDGETS.changed_by(SMALL).as_record()
    for name in ("train_loss", "eval_loss"):
        assert math.isclose(first.metrics[name], second.metrics[name], rel_tol=1e-4)


def test_a_repeated_run_has_the_budgets_that_were_recorded(llama: Path, tmp_path: Path) -> None:
    run, ledger = tiny_run(llama, global_batch_size=8), Ledger(tmp_path)
    finished(replace(run, budgets=SMALL), ledger)
    assert rerun(run, ledger).differences == ()


@pytest.mark.parametrize("larger", [True, False])
def test_a_training_goes_on_in_the_micro_batches_it_began_with_where_they_fit(
    larger: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ledger = tiny_run(llama, global_batch_size=8), Ledger(tmp_path)
    cut_short(replace(run, budgets=SMALL), ledger, monkeypatch)
    record = finished(replace(run, budgets=replace(SMALL, micro_batch_tokens=800 if larger else 100)), ledger)
    log = (ledger.run_folder(run.run_id) / "train.log").read_text()
    assert record.measured["budgets"]["micro_batch_tokens"] == (150 if larger else 100)
    said = "goes on with micro-batches of 100 tokens where it began with 150: the last bits of its numbers will differ"
    assert (said in log) != larger


def cut_short(run: Run, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        steps = run_cell(run, ledger, WorkerCache())
        next(steps)
        next(steps)
        steps.close()
