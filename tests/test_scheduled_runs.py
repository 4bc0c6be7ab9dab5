"""Whole runs whose schedule changes masks: what they record, what they leave, and that they are made again from it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from safetensors.torch import load_file

from trainables import training
from trainables.pipeline import run_cell
from trainables.rebuild import deployed_by
from trainables.rerun import rerun
from trainables.worker import WorkerCache
from tune_sparse.config import ScheduleSettings
from tune_sparse.errors import InputError
from tune_sparse.files import read_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.pruning.mask_io import read_bits
from tune_sparse.schedules import mean_sparsity

CPU = torch.device("cpu")
STEPS = 8


def scheduled_run(model: Path, schedule: str, **changes: Any) -> Run:
    """Updates after 2 and 4 (set, rigl), or 3, 5 and 6 (gradual)."""
    own = {name: changes.pop(name) for name in list(changes) if name in vars(ScheduleSettings())}
    settings = ScheduleSettings(update_every=2, gradual_updates=3, **own)
    run = tiny_run(model, mode="masked-finetuning", schedule=schedule, **{"steps": STEPS, "eval_every": 4} | changes)
    return replace(run, schedule_settings=settings)


@pytest.fixture(scope="module")
def ran(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(run, its ledger, its record) of each schedule, run once."""
    done: dict[str, tuple[Run, Ledger, Record]] = {}

    def get(name: str) -> tuple[Run, Ledger, Record]:
        if name not in done:
            schedule, revivable = name.partition(" ")[::2]
            run, ledger = (
                scheduled_run(llama, schedule, revivable=bool(revivable)),
                Ledger(tmp_path_factory.mktemp("r")),
            )
            done[name] = run, ledger, finished(run, ledger)
        return done[name]

    return get


NAMES = ["gradual", "gradual revivable", "set", "rigl"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_ends_with_the_zeros_of_its_target_and_says_so_everywhere(name: str, ran: Any) -> None:
    run, ledger, record = ran(name)
    assert (record.status, record.error) == ("done", None)
    folder = ledger.run_folder(run.run_id)
    masks, described = read_bits(folder / "masks.safetensors", CPU), read_json(folder / "sparse_config.json")
    report = read_json(folder / "validation_report.json")
    assert masks.sparsity == record.metrics["actual_sparsity"] == report["actual_sparsity"] == 0.5
    assert masks.sha256 == record.metrics["mask_sha256"] == described["mask_sha256"] == report["mask_sha256"]
    for matrix, weight in load_file(folder / "weights" / "weights.safetensors").items():
        assert torch.equal(weight != 0, masks[matrix])


def test_a_gradual_run_begins_with_the_dense_model(ran: Any, llama: Path, tmp_path: Path) -> None:
    dense = finished(tiny_run(llama, mode="dense", method="none", sparsity=0.0), Ledger(tmp_path))
    run, _, record = ran("gradual")
    assert record.metrics["accuracy_before_tuning"] == dense.metrics["accuracy_before_tuning"]
    assert run.pruned_baseline_id != ran("set")[0].pruned_baseline_id


def test_training_flops_are_those_of_the_mean_sparsity(ran: Any) -> None:
    """Gradual: 0, 1/6, 1/3, 1/2 for 3, 2, 1 and 2 steps."""
    metrics = {name: ran(name)[2].metrics for name in ("gradual", "set", "rigl")}
    assert mean_sparsity(0.0, ran("gradual")[0].updates, STEPS) == pytest.approx((2 / 6 + 1 / 3 + 2 / 2) / 8)
    assert metrics["gradual"]["train_step_flops"] > metrics["set"]["train_step_flops"]
    assert metrics["rigl"]["train_step_flops"] == metrics["set"]["train_step_flops"]
    assert metrics["gradual"]["inference_flops"] == metrics["set"]["inference_flops"]


@pytest.mark.parametrize("name", NAMES)
def test_the_scored_model_is_made_again(name: str, ran: Any) -> None:
    run, ledger, _ = ran(name)
    loaded, masks = deployed_by(run, ledger, WorkerCache())
    for matrix, weight in prunable_weights(loaded.model).items():
        assert torch.equal(weight != 0, masks[matrix])


def test_other_masks_than_those_trained_are_refused(ran: Any, tmp_path: Path) -> None:
    run, ledger, _ = ran("set")
    gradual, theirs, _ = ran("gradual")
    copy = Ledger(tmp_path / "results")
    shutil.copytree(ledger.folder, copy.folder)
    masks = Path("masks.safetensors")
    shutil.copy(theirs.run_folder(gradual.run_id) / masks, copy.run_folder(run.run_id) / masks)
    with pytest.raises(InputError, match="must come out as it was trained"):
        deployed_by(run, copy, WorkerCache())


@pytest.mark.parametrize("name", ["rigl", pytest.param("gradual revivable", marks=pytest.mark.slow)])
def test_a_repetition_repeats_every_bit(name: str, ran: Any) -> None:
    run, ledger, _ = ran(name)
    comparison = rerun(run, ledger)
    assert comparison.differences == ()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("done", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_a_training_closed_at_and_beside_updates_goes_on_to_the_same_bits(
    name: str, done: int, ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, expected = ran(name)
    ledger = Ledger(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        steps = run_cell(run, ledger, WorkerCache())
        for _ in range(done):
            next(steps)
        next(steps)  # a checkpoint is written before a step is told
        steps.close()
    assert finished(run, ledger).metrics == expected.metrics


def test_without_updates_a_schedule_is_the_one_shot_run(llama: Path, tmp_path: Path) -> None:
    one_shot = scheduled_run(llama, "one-shot", steps=2)
    rigl = scheduled_run(llama, "rigl", steps=2)
    assert not rigl.updates
    same, other = (finished(run, Ledger(tmp_path)).metrics for run in (one_shot, rigl))
    assert same == other
