"""A level of a chain begins where the one before it ended, is pruned further, tuned, scored and kept as any run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainables import pipeline
from trainables.masked_finetuning import SAVED
from trainables.rebuild import deployed_by
from trainables.rerun import rerun
from trainables.training import chain_rate_at
from trainables.worker import WorkerCache
from tune_sparse.errors import NotReadyError
from tune_sparse.files import read_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.schedules import SCHEDULES
from tune_sparse.sweep.chains import chain, last_of_chain
from tune_sparse.training.loop import learning_rate_at


def a_chain(llama: Path, levels: Sequence[float] = (0.2, 0.5), **changes: Any) -> list[Run]:
    """The runs of a chain of levels, the first one first."""
    settings = {name: changes.pop(name) for name in ("rescore", "restart_learning_rate") if name in changes}
    cell = {"mode": "masked-finetuning", "schedule": "iterative", "sparsity": levels[-1], "steps": 5}
    run = tiny_run(llama, **cell | changes)
    run = replace(run, schedule_settings=replace(run.schedule_settings, levels=tuple(levels), **settings))
    return chain(
        last_of_chain(run, SCHEDULES["iterative"].levels(run.schedule_settings, levels[-1], run.protocol.steps))
    )


def trained(run: Run, ledger: Ledger, worker: WorkerCache) -> Record:
    record = finished(run, ledger, worker)
    assert record.status == "done", record.error
    return record


def saved(ledger: Ledger, run: Run) -> dict[str, Tensor]:
    return load_file(ledger.run_folder(run.run_id) / SAVED)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


@pytest.mark.parametrize("method", ["unstructured", "sparsegpt"])
def test_one_level_is_one_shot_and_masked_finetuning_bit_for_bit(method: str, llama: Path, tmp_path: Path) -> None:
    [level] = a_chain(llama, [0.5], method=method)
    shot = tiny_run(llama, mode="masked-finetuning", method=method, steps=5)
    assert level.draw_seed == shot.draw_seed
    first, second = (trained(run, Ledger(tmp_path / run.cell.schedule), WorkerCache()) for run in (level, shot))
    assert {name: first.metrics[name] for name in second.metrics} == second.metrics


@pytest.mark.parametrize(
    ("method", "rescore"),
    [
        *((method, True) for method in ("unstructured", "sparsegpt")),
        ("wanda", False),
        *(pytest.param(method, True, marks=pytest.mark.slow) for method in ("wanda", "structured", "random")),
        pytest.param("unstructured", False, marks=pytest.mark.slow),
    ],
)
def test_masks_are_nested_and_tuning_leaves_the_zeros_of_the_pruning(
    method: str, rescore: bool, llama: Path, ledger: Ledger
) -> None:
    worker, runs = WorkerCache(), a_chain(llama, method=method, rescore=rescore)
    first, second = (trained(run, ledger, worker) for run in runs)
    assert worker.loads == 1
    (model, masks), low = deployed_by(runs[1], ledger, worker), deployed_by(runs[0], ledger, WorkerCache())[1]
    before, after = (saved(ledger, run) for run in runs)
    for name, weight in prunable_weights(model.model).items():
        assert not (masks[name] & ~low[name]).any()
        assert torch.equal(weight, after[name])
        assert not after[name][~masks[name]].any()
        assert not torch.equal(after[name], before[name] * masks[name]), "it was tuned"
    assert second.metrics["actual_sparsity"] == second.metrics["sparsity_before_tuning"] == masks.sparsity
    assert [r.metrics["level_steps"] for r in (first, second)] == [3, 2]
    assert [r.metrics["chain_steps_so_far"] for r in (first, second)] == [3, 5]
    described = read_json(ledger.run_folder(runs[1].run_id) / "sparse_config.json")
    assert described["level_before"] == runs[0].run_id
    assert first.metrics["accuracy_before_tuning"] is not None


def test_a_level_prunes_the_smallest_of_the_tuned_weights(llama: Path, ledger: Ledger) -> None:
    worker, runs = WorkerCache(), a_chain(llama)
    for run in runs:
        trained(run, ledger, worker)
    _, masks = deployed_by(runs[1], ledger, worker)
    for name, weight in saved(ledger, runs[0]).items():
        gone = weight[~masks[name]].abs().max()
        assert gone <= weight[masks[name]].abs().min()


def test_a_level_is_repeated_to_the_last_bit(llama: Path, ledger: Ledger) -> None:
    worker, runs = WorkerCache(), a_chain(llama, method="sparsegpt")
    for run in runs:
        trained(run, ledger, worker)
    assert rerun(runs[1], ledger).differences == ()


def test_learning_rates_begin_anew_or_go_over_the_whole_chain(llama: Path, ledger: Ledger) -> None:
    worker = WorkerCache()
    for restarts in (True, False):
        runs = a_chain(llama, restart_learning_rate=restarts)
        for run in runs:
            trained(run, ledger, worker)
        lines = [(ledger.run_folder(run.run_id) / "metrics.jsonl").read_text() for run in runs]
        rates = [line for text in lines for line in text.splitlines() if "learning_rate" in line]
        whole = [learning_rate_at(step, runs[-1].protocol) for step in range(5)]
        own = [learning_rate_at(step, run.own_protocol) for run in runs for step in range(run.own_steps)]
        expected = own if restarts else whole
        assert all(f'"learning_rate": {rate}' in line for rate, line in zip(expected, rates, strict=True))
    assert [chain_rate_at(step, runs[1]) for step in range(2)] == whole[3:]


def test_a_level_waits_for_the_one_before_it(llama: Path, ledger: Ledger) -> None:
    _, last = a_chain(llama)
    with pytest.raises(NotReadyError, match="must be done"):
        finished(last, ledger)
    assert not ledger.run_ids(), "it may go well another time"


@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_weights_that_are_not_those_that_were_scored_are_refused(fault: str, llama: Path, ledger: Ledger) -> None:
    first, last = a_chain(llama)
    trained(first, ledger, WorkerCache())
    path = ledger.run_folder(first.run_id) / SAVED
    weights = load_file(path)
    if fault == "gone":
        path.unlink()
    else:
        save_file({name: weight * 2 for name, weight in weights.items()}, path)
    record = finished(last, ledger)
    assert record.error is not None
    assert (record.error["class"], record.error["retryable"]) == ("RunError", False)
    assert f"begins from the weights of the level before it, {first.run_id}" in record.error["message"]


def test_tuning_that_fills_the_zeros_of_its_level_fails(
    llama: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault of github.com/Aquaib111/Sparse-GPT-Finetuning: the gradients were masked by the level before."""
    worker, (first, last) = WorkerCache(), a_chain(llama)
    trained(first, ledger, worker)
    _, before = deployed_by(first, ledger, WorkerCache())
    setup = pipeline.setup

    def set_up_before(mode: str, model: Any, protocol: Any, masks: Any, *more: Any, **named: Any) -> Any:
        return setup(mode, model, protocol, before, *more, **named)

    monkeypatch.setattr(pipeline, "setup", set_up_before)
    record = finished(last, ledger, worker)
    assert record.error is not None
    assert "masked weights must be 0" in record.error["message"]


def test_a_larger_target_goes_on_from_what_is_there(llama: Path, ledger: Ledger) -> None:
    worker, runs = WorkerCache(), a_chain(llama, (0.2, 0.5), steps=4)
    for run in runs:
        trained(run, ledger, worker)
    *earlier, last = a_chain(llama, (0.2, 0.5, 0.7), steps=6)
    assert [run.run_id for run in earlier] == [run.run_id for run in runs]
    shutil.rmtree(ledger.run_folder(runs[0].run_id))
    assert trained(last, ledger, worker).metrics["actual_sparsity"] == pytest.approx(0.7, abs=1e-3)
