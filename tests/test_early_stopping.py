"""Which trainings are stopped early, and that a rung changes no bit of those that go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factories import failed_record, finished, make_cell, make_run, make_sweep, tiny_run, write_run
from ray.tune.schedulers import TrialScheduler

from analysis.audit.audit import audit
from analysis.read.load import NUMBERS, cells_table
from analysis.read.results import read_results
from trainables import torch_backend, training
from trainables.pipeline import run_cell
from trainables.rungs import Rungs
from trainables.worker import WorkerCache
from tune_sparse.config import EarlyStopping, Protocol, SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.reader import MergedLedger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.ledger.rungs import RungJournal
from tune_sparse.sweep.early_stopping import EarlyStopper
from tune_sparse.sweep.retries import is_missing
from tune_sparse.sweep.siblings import check_siblings
from tune_sparse.tracking.entries import run_entry

HALVES = EarlyStopping(stop_early="loss", rungs=(0.25, 0.5), reduction=2)


def siblings(*rates: float, **cell: Any) -> list[Run]:
    """Trainings of one cell that differ in their learning rates."""
    protocol = Protocol(steps=100)
    return [make_run(make_cell(**cell), protocol=replace(protocol, learning_rate=rate)) for rate in rates]


def stopper(runs: Sequence[Run], folder: Path, config: EarlyStopping = HALVES) -> EarlyStopper:
    return EarlyStopper(config, {run.run_id: run for run in runs}, RungJournal(folder))


def reaches(judge: EarlyStopper, run: Run, *rungs: tuple[int, float]) -> bool:
    """Whether a run goes on that reports so."""
    answer = judge.on_trial_result(None, SimpleNamespace(), {"run_id": run.run_id, "rungs": list(rungs)})
    return answer == TrialScheduler.CONTINUE


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [({}, 90, (10, 30)), ({"reduction": 2}, 100, (25, 50)), ({"rungs": (0.1, 0.2, 0.7)}, 20, (2, 4, 14))],
)
def test_rungs_are_prefixes_of_the_whole_training(
    settings: dict[str, Any], steps: int, expected: tuple[int, ...]
) -> None:
    assert EarlyStopping(stop_early="loss", **settings).rung_steps(steps) == expected


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"rungs": "1/4 1"}, "below 1"),
        ({"rungs": "3/2"}, "below 1"),
        ({"rungs": "1/0"}, "rungs"),
        ({"rungs": ""}, "at least one"),
        ({"rungs": "1/2 1/4"}, "must rise"),
        ({"rungs": "1/2 1/2"}, "must rise"),
        ({"reduction": 1}, "at least 2"),
        ({"stop_early": "speed"}, "stop_early"),
        ({"steps": 2, "warmup_steps": 0}, "different steps"),
        ({"steps": 20, "rungs": "0.5 0.51"}, "different steps"),
        ({"backend": "cerebras", "masked_lora_impl": "auto"}, "backend cerebras"),
        ({"schedules": "iterative", "modes": "masked-finetuning"}, "schedule iterative"),
    ],
)
def test_bad_rungs_are_refused_with_the_reason(names: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        SweepConfig.from_names({"models": "tiny-llama", "stop_early": "loss"} | names)


def test_fractions_are_read_as_they_are_written() -> None:
    config = SweepConfig.from_names({"models": "tiny-llama", "stop_early": "loss", "rungs": "1/4 1/2"})
    assert config.early_stopping == replace(HALVES, reduction=3)


def test_there_must_be_something_to_compare() -> None:
    with pytest.raises(InputError, match="one training for each cell"):
        check_siblings(HALVES, [*siblings(1e-3), *siblings(1e-3, seed=1)])
    check_siblings(HALVES, siblings(1e-3, 1e-4))
    with pytest.raises(InputError, match="tasks with questions"):
        check_siblings(replace(HALVES, stop_early="accuracy"), siblings(1e-3, 1e-4, task="wikitext2"))


def test_the_worse_half_of_those_before_is_stopped(tmp_path: Path) -> None:
    first, worse, better, middle = siblings(1e-3, 2e-3, 3e-3, 4e-3)
    judge = stopper([first, worse, better, middle], tmp_path)
    assert reaches(judge, first, (25, 1.0))
    assert not reaches(judge, worse, (25, 1.1))
    assert reaches(judge, better, (25, 0.5))
    assert reaches(judge, first)
    assert not reaches(judge, middle, (25, 1.05))
    assert reaches(judge, first, (50, 0.9))
    assert not reaches(judge, better, (50, 0.95))
    assert judge.record(better).stopped == {
        "step": 50,
        "steps": 100,
        "by": "loss",
        "values": {"25": 0.5, "50": 0.95},
    }


def test_accuracy_is_judged_the_other_way_round(tmp_path: Path) -> None:
    first, second, third = siblings(1e-3, 2e-3, 3e-3)
    judge = stopper([first, second, third], tmp_path, replace(HALVES, stop_early="accuracy"))
    assert reaches(judge, first, (25, 0.6))
    assert reaches(judge, second, (25, 0.7))
    assert not reaches(judge, third, (25, 0.5))


@pytest.mark.parametrize(
    "difference", [{"seed": 1}, {"sparsity": 0.7}, {"mode": "sparse-to-sparse"}, {"task": "gsm8k"}]
)
def test_only_siblings_of_one_cell_are_compared(difference: dict[str, Any], tmp_path: Path) -> None:
    good, bad = siblings(1e-3)[0], siblings(2e-3, **difference)[0]
    judge = stopper([good, bad], tmp_path)
    assert reaches(judge, good, (25, 0.1))
    assert reaches(judge, bad, (25, 9.0))


@pytest.mark.parametrize("setting", [{"steps": 200}, {"train_on_prompt": True}])
def test_like_is_judged_with_like(setting: dict[str, Any], tmp_path: Path) -> None:
    good, bad = siblings(1e-3, 2e-3)
    bad = replace(bad, protocol=replace(bad.protocol, **setting))
    judge = stopper([good, bad], tmp_path)
    assert reaches(judge, good, (25, 0.1))
    assert reaches(judge, bad, (bad.protocol.steps // 4, 9.0))


def test_a_driver_that_goes_on_decides_as_the_one_before(tmp_path: Path) -> None:
    runs = siblings(*(n * 1e-4 for n in range(1, 9)))
    losses = [0.9, 1.0, 0.8, 0.85, 0.95, 0.7, 0.75, 0.6]
    undisturbed, killed = stopper(runs, tmp_path / "a"), stopper(runs, tmp_path / "b")
    for folder in "ab":
        (tmp_path / folder).mkdir()
    expected = [reaches(undisturbed, run, (25, loss)) for run, loss in zip(runs, losses, strict=True)]
    found = [reaches(killed, run, (25, loss)) for run, loss in zip(runs[:5], losses, strict=False)]
    with (tmp_path / "b" / "rungs.jsonl").open("a") as journal:
        journal.write('{"run_id": "cut sho')
    goes_on = stopper(runs, tmp_path / "b")
    assert [goes_on.is_stopped(run.run_id) for run in runs[:5]] == [not goes for goes in found]
    assert reaches(goes_on, runs[0], (25, losses[0]))  # told once more after the kill
    found += [reaches(goes_on, run, (25, loss)) for run, loss in zip(runs[5:], losses[5:], strict=True)]
    assert found == expected
    assert True in expected
    assert False in expected
    assert [rung.value for rung in RungJournal(tmp_path / "b").read()] == losses


def test_other_rungs_judge_anew(tmp_path: Path) -> None:
    good, bad = siblings(1e-3, 2e-3)
    judge = stopper([good, bad], tmp_path)
    reaches(judge, good, (25, 0.1))
    assert not reaches(judge, bad, (25, 9.0))
    assert stopper([good, bad], tmp_path).is_stopped(bad.run_id)
    assert not stopper([good, bad], tmp_path, replace(HALVES, rungs=(0.5,))).is_stopped(bad.run_id)
    assert not stopper([good, bad], tmp_path, replace(HALVES, stop_early="accuracy")).is_stopped(bad.run_id)
    assert not stopper([bad], tmp_path).is_stopped(bad.run_id)


def stopped_record(run: Run, loss: float = 0.123456) -> Record:
    stopped = {"step": 25, "steps": 100, "by": "loss", "values": {"25": loss}}
    return Record(run.run_id, run.identity, "stopped", stopped=stopped)


def test_a_stopped_training_is_nowhere_a_number(tmp_path: Path) -> None:
    [run] = siblings(1e-3)
    ledger = Ledger(tmp_path)
    ledger.write_record(run, stopped_record(run))
    ledger.write_sweep(make_sweep([run.cell], protocol=run.protocol))
    [row] = cells_table([tmp_path]).to_dict("records")
    assert (row["status"], row["error"]) == ("stopped", "stopped early at step 25 of 100, judged by loss")
    assert all(row[name] != row[name] for name in NUMBERS if name not in ("sparsity", "chance_accuracy"))
    results = read_results([tmp_path])
    assert not results.done
    [finding] = [f for f in audit(results).findings if f.rule == "missing"]
    assert finding.text == "1 cells were stopped early, by the sweep's stop_early: they have no result"
    assert not audit(results).errors
    entry = run_entry(MergedLedger([tmp_path]), stopped_record(run))
    assert (entry.points, entry.status) == ((), "KILLED")
    assert "0.123" not in str(entry)


def test_a_stopped_training_is_missing_until_a_sweep_stops_it_again(tmp_path: Path) -> None:
    [run] = siblings(1e-3)
    assert is_missing(stopped_record(run))
    here, there = Ledger(tmp_path / "here"), Ledger(tmp_path / "there")
    here.write_record(run, stopped_record(run))
    write_run(there, run, failed_record(run))
    record = MergedLedger([tmp_path / "here", tmp_path / "there"]).record(run.run_id)
    assert record is not None
    assert record.status == "failed"
    assert here.record(run.run_id) == stopped_record(run)


def parameters_at(path: Path) -> list[torch.Tensor]:
    """The trained tensors of a checkpoint."""
    parameters: list[torch.Tensor] = torch.load(path, weights_only=True)["parameters"]
    return parameters


@dataclass(frozen=True)
class Told:
    """What a training told of its rungs before it was killed, and where it stood."""

    values: list[tuple[int, float]]
    parameters: list[torch.Tensor]


def kill_at_next_rung(run: Run, ledger: Ledger, worker: WorkerCache, by: str) -> Told:
    rungs, values = Rungs((2, 4), by), list[tuple[int, float]]()
    steps = run_cell(run, ledger, worker, partial(torch_backend.train_stage, rungs=rungs))
    for step in steps:
        is_new = rungs.is_waiting and step is not None  # what a checkpoint knows is told before the first step
        values += rungs.told()
        if is_new:
            break
    steps.close()
    ledger.remove_partial()
    return Told(values, parameters_at(ledger.checkpoint(run.run_id)))


@pytest.mark.parametrize(
    ("changes", "by"),
    [({"mode": "sparse-to-dense", "lora_dropout": 0.2}, "loss"), ({"mode": "masked-finetuning"}, "accuracy")],
    ids=["sparse-to-dense", "masked-finetuning"],
)
def test_a_promoted_training_has_the_bits_of_an_undisturbed_one(
    changes: dict[str, Any], by: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, worker = tiny_run(llama, steps=6, **changes), WorkerCache()
    undisturbed, ledger = Ledger(tmp_path / "undisturbed"), Ledger(tmp_path / "promoted")
    checkpoints = {}
    with monkeypatch.context() as patched:
        patched.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        for step in run_cell(run, undisturbed, worker):
            if step is not None and step.step in (2, 4):
                checkpoints[step.step] = parameters_at(undisturbed.checkpoint(run.run_id))
    told = [kill_at_next_rung(run, ledger, worker, by), kill_at_next_rung(run, ledger, worker, by)]
    for rungs in told:
        assert all(map(torch.equal, rungs.parameters, checkpoints[rungs.values[-1][0]]))
    assert [[step for step, _ in rungs.values] for rungs in told] == [[2], [2, 4]]
    assert told[0].values == told[1].values[:1]  # a driver that was killed is told again
    record = finished(run, ledger, worker)
    assert record.metrics == undisturbed.record(run.run_id).metrics  # type: ignore[union-attr]
    curves = [(at.run_folder(run.run_id) / "metrics.jsonl").read_text() for at in (undisturbed, ledger)]
    assert curves[0] == curves[1]
