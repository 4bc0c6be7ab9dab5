"""A killed training goes on from its checkpoint to the same bits; totals and rates are those of what was trained."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from safetensors.torch import load_file

from trainables import training
from trainables.pipeline import run_cell
from trainables.training import Training
from trainables.worker import WorkerCache
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.training.loop import Step

KILLED = """
import json, sys, time
from pathlib import Path
from trainables import training
from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run

training.CHECKPOINT_SECONDS = 0.0
run, results = Run.from_config(json.loads(sys.argv[1])), Path(sys.argv[2])
for step in run_cell(run, Ledger(results), WorkerCache()):
    if step.step == 3:
        print("three steps", flush=True)
        time.sleep(600)
"""


def kill_in_mid_training(run: Run, ledger: Ledger) -> None:
    arguments = [sys.executable, "-W", "ignore", "-c", KILLED, json.dumps(run.as_config()), str(ledger.folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "three steps\n"
        child.kill()
        assert child.wait() == -signal.SIGKILL


def trained_tensors(ledger: Ledger, run: Run) -> dict[str, torch.Tensor]:
    [path] = ledger.run_folder(run.run_id).glob("*/*.safetensors")
    return load_file(path)


def curve(ledger: Ledger, run: Run) -> str:
    return (ledger.run_folder(run.run_id) / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "sparse-to-sparse", "lora_dropout": 0.2},
        {"mode": "masked-finetuning"},
        {"mode": "masked-finetuning", "schedule": "gradual"},  # updates after 2, 3, 4 and 5, killed after 3
    ],
    ids=lambda changes: changes.get("schedule", changes["mode"]),
)
def test_a_killed_training_goes_on_to_the_same_bits(changes: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    run = tiny_run(llama, steps=6, **changes)
    undisturbed, ledger = Ledger(tmp_path / "undisturbed"), Ledger(tmp_path / "killed")
    expected = finished(run, undisturbed)
    kill_in_mid_training(run, ledger)
    ledger.remove_partial()
    assert ledger.checkpoint(run.run_id).exists()
    assert ledger.record(run.run_id) is None
    record = finished(run, ledger)
    assert record.status == "done"
    assert record.metrics == expected.metrics
    assert curve(ledger, run) == curve(undisturbed, run)
    theirs, ours = trained_tensors(undisturbed, run), trained_tensors(ledger, run)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    log = (ledger.run_folder(run.run_id) / "train.log").read_text()
    assert "goes on after step 3 of a training that was cut short" in log
    assert not ledger.checkpoint(run.run_id).exists()


def interrupted(run: Run, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a training that was closed after two steps."""
    with monkeypatch.context() as patched:
        patched.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        steps = run_cell(run, ledger, WorkerCache())
        next(steps)
        next(steps)
        steps.close()
    return ledger.checkpoint(run.run_id)


@pytest.mark.parametrize("damage", ["cut short", "changed", "empty"])
def test_a_broken_checkpoint_is_not_trained_on(
    damage: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ledger = tiny_run(llama), Ledger(tmp_path / "results")
    path = interrupted(run, ledger, monkeypatch)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes({"cut short": bytes(content[:middle]), "changed": bytes(content), "empty": b""}[damage])
    record = finished(run, ledger)
    assert record.metrics == finished(run, Ledger(tmp_path / "fresh")).metrics
    log = (ledger.run_folder(run.run_id) / "train.log").read_text()
    assert "begins anew: " in log
    assert "cannot be read whole" in log
    assert not path.exists()


def test_a_checkpoint_of_another_run_is_not_trained_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ledger = tiny_run(llama), Ledger(tmp_path / "results")
    other = interrupted(tiny_run(llama, learning_rate=5e-3), ledger, monkeypatch)
    other.rename(ledger.checkpoint(run.run_id))
    assert finished(run, ledger).metrics == finished(run, Ledger(tmp_path / "fresh")).metrics


def test_a_run_that_fails_for_good_leaves_no_checkpoint(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    run, ledger = tiny_run(llama, learning_rate=1e30), Ledger(tmp_path / "results")
    assert finished(run, ledger).status == "failed"
    assert not list((ledger.folder / "checkpoints").iterdir())


def test_a_short_training_writes_no_checkpoint(llama: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "results")
    assert finished(tiny_run(llama), ledger).status == "done"
    assert not (ledger.folder / "checkpoints").exists()


def test_rates_leave_out_the_warm_up_steps() -> None:
    totals = Training()
    for number, seconds in enumerate([9.0, 5.0, 1.0, 3.0], start=1):
        totals.add(Step(number, 0.5, 1e-3, examples=8, tokens=100, seconds=seconds), cold=number <= 2)
    assert totals.rates() == {"train_examples_per_second": 4.0, "train_tokens_per_second": 50.0}
    assert (totals.seconds, totals.examples, totals.tokens, totals.steps) == (18.0, 32, 400, 4)


def test_a_training_of_warm_up_steps_alone_has_no_rate() -> None:
    totals = Training()
    totals.add(Step(1, 0.5, 1e-3, examples=8, tokens=100, seconds=1.0), cold=True)
    assert totals.rates() == {"train_examples_per_second": None, "train_tokens_per_second": None}
