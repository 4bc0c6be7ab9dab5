"""The training stage on Cerebras, with a stand-in for the site's environment: its files, its faults, its end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from factories import finished, tiny_run
from safetensors.torch import load_file

from tune_sparse.cerebras.failures import ApplianceError, DiskFullError
from tune_sparse.cerebras.guard import is_guarded, read_ended
from tune_sparse.cerebras.preflight import end_leftovers
from tune_sparse.config import Cerebras
from tune_sparse.errors import RunError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run

ON_CPU = {"target": "cpu", "release": "2.10.0"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


def cerebras_run(model: Path, **changes: Any) -> Run:
    return replace(tiny_run(model, backend="cerebras", **changes), cerebras=ON_CPU)


def failed(record: Record) -> str:
    assert record.status == "failed"
    assert record.error is not None
    return str(record.error["message"])


def job_folder(ledger: Ledger, run: Run) -> Path:
    return ledger.folder / "cerebras" / run.run_id


def list_processes(folder: Path) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        ("dense", "none"),
        ("sparse-to-dense", "sparsegpt"),
        ("sparse-to-sparse", "unstructured"),
        ("sparse-to-sparse", "structured"),
        ("masked-finetuning", "unstructured"),
    ],
)
def test_a_cell_is_trained_merged_scored_and_validated(
    llama: Path, site: Path, ledger: Ledger, mode: str, method: str
) -> None:
    run = cerebras_run(llama, mode=mode, method=method, sparsity=0.0 if mode == "dense" else 0.5)
    record = finished(run, ledger)
    assert record.status == "done", record.error
    assert record.environment["trained_on"] == "cerebras cpu 2.10.0"
    folder = ledger.run_folder(run.run_id)
    report = json.loads((folder / "validation_report.json").read_text())
    assert report["all_valid"]
    assert report["max_abs_at_masked"] in (0, None)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert "smaller model" not in (folder / "train.log").read_text()
    assert not {"start.mdl", "trained.safetensors"} & {path.name for path in job_folder(ledger, run).iterdir()}
    assert record.measured["sparsity_annotation"] == "rounded"
    assert record.measured["padded_tokens"] > 0
    assert "budgets and eval_every have no effect" in (folder / "train.log").read_text()


def test_what_was_trained_there_is_what_is_kept_here(llama: Path, site: Path, ledger: Ledger) -> None:
    run = cerebras_run(llama)
    finished(run, ledger)
    saved = load_file(ledger.run_folder(run.run_id) / "adapter" / "adapter_model.safetensors")
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(tensor, torch.full_like(tensor, 0.01)) or "lora_A" in name


FAULTS = {
    "converter": "ValueError: the converter cannot",
    "dense": r"the model that trains on Cerebras must be the pruned one: .* got 9\.9",
    "nan": "the training loss must stay finite, got nan at step 2",
    "changed": r"must leave the base alone: model\.lm_head\.weight: the frozen weight must not change",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_lasts_fails_the_run_and_nothing_takes_its_place(
    llama: Path, site: Path, ledger: Ledger, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path / "cache"))
    (site / "fault").write_text(fault)
    run = cerebras_run(llama)
    record = finished(run, ledger)
    assert record.error is not None
    assert not record.error["retryable"]
    assert re.search(FAULTS[fault], failed(record))
    assert record.metrics == {}
    assert "See /" in failed(record) or fault != "converter"


@pytest.mark.parametrize(("fault", "message"), [("unavailable", "was unavailable"), ("kill", "killed by signal 9")])
def test_a_fault_that_passes_is_raised_so_that_the_run_is_tried_again(
    llama: Path, site: Path, ledger: Ledger, fault: str, message: str
) -> None:
    (site / "fault").write_text(fault)
    run = cerebras_run(llama)
    with pytest.raises(ApplianceError, match=f"{message}.*child.log"):
        finished(run, ledger)
    assert not is_guarded(job_folder(ledger, run))
    (site / "fault").unlink()
    assert finished(run, ledger).status == "done"


def test_a_full_disk_is_raised_in_the_words_that_stop_a_sweep(llama: Path, site: Path, ledger: Ledger) -> None:
    (site / "fault").write_text("disk")
    run = cerebras_run(llama)
    with pytest.raises(DiskFullError, match=r"Disk quota exceeded\. Free some"):
        finished(run, ledger)
    assert not is_guarded(job_folder(ledger, run))
    assert not (job_folder(ledger, run) / "start.mdl").exists()


def test_a_training_that_takes_too_long_fails_with_the_setting_to_raise(
    llama: Path, site: Path, ledger: Ledger
) -> None:
    from trainables.cerebras_backend import CerebrasTraining
    from trainables.pipeline import run_cell
    from trainables.worker import WorkerCache

    (site / "fault").write_text("hang")
    run = cerebras_run(llama)
    train_stage = CerebrasTraining(Cerebras("cpu", train_timeout_seconds=2))
    steps = run_cell(run, ledger, WorkerCache(), train_stage)
    record = exhausted(steps)
    assert "within train_timeout_seconds" in failed(record)
    assert list_processes(job_folder(ledger, run)) == []


def exhausted(steps: Iterator[Any]) -> Record:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def test_a_stop_in_mid_run_returns_at_once_and_leaves_no_process(llama: Path, site: Path, ledger: Ledger) -> None:
    from trainables.pipeline import run_cell
    from trainables.worker import WorkerCache

    (site / "fault").write_text("hang")
    run = cerebras_run(llama)
    steps = run_cell(run, ledger, WorkerCache())
    while (step := next(steps)) is None or step.step < 2:
        pass
    began = time.monotonic()
    steps.close()
    assert time.monotonic() - began < 3, "Ray gives a trial three seconds"
    deadline = time.monotonic() + 20
    while read_ended(job_folder(ledger, run)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ended = read_ended(job_folder(ledger, run))
    assert ended is not None
    assert ended.why == "stopped"
    assert not (job_folder(ledger, run) / "start.mdl").exists()
    assert ledger.record(run.run_id) is None


def test_a_lost_training_goes_on_from_its_checkpoint(llama: Path, site: Path, ledger: Ledger) -> None:
    from trainables.cerebras_backend import CerebrasTraining
    from trainables.pipeline import run_cell
    from trainables.worker import WorkerCache

    run, stage = cerebras_run(llama), CerebrasTraining(Cerebras("cpu", checkpoint_steps=2))
    (site / "fault").write_text("kill")
    with pytest.raises(ApplianceError, match="killed by signal 9"):
        exhausted(run_cell(run, ledger, WorkerCache(), stage))
    assert (job_folder(ledger, run) / "restart.mdl").exists()
    (site / "fault").unlink()
    record = exhausted(run_cell(run, ledger, WorkerCache(), stage))
    assert record.status == "done", record.error
    lines = list(map(json.loads, (job_folder(ledger, run) / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines] == [0, 1, 2, 0, 3, 4]
    assert "goes on after step 2" in (ledger.run_folder(run.run_id) / "train.log").read_text()
    assert not {"restart.mdl", "lost.json"} & {path.name for path in job_folder(ledger, run).iterdir()}


def test_waits_between_tries_grow_and_end_with_a_training_that_went_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainables import cerebras_tries

    now = [1000.0]
    monkeypatch.setattr(cerebras_tries.time, "time", lambda: now[0])
    assert cerebras_tries.waiting_seconds(tmp_path) == 0
    waits = []
    for _ in range(7):
        cerebras_tries.note_lost(tmp_path)
        cerebras_tries.prepare_try(tmp_path)
        waits.append(cerebras_tries.waiting_seconds(tmp_path))
    assert waits == [30, 60, 120, 240, 480, 900, 900]
    now[0] += 300
    assert cerebras_tries.waiting_seconds(tmp_path) == 600
    now[0] += 86400
    assert cerebras_tries.waiting_seconds(tmp_path) == 0


def test_settings_reach_the_job_and_defaults_are_left_to_the_client() -> None:
    from tune_sparse.cerebras.job import job_appliance

    plain = job_appliance(Cerebras(), ["name=x"])
    assert plain["cluster"] == {"job_labels": ["name=x"]}
    assert (plain["compile_dir"], plain["micro_batch_size"], plain["compile_only"]) == (None, "auto", False)
    chosen = {"num_workers_per_csx": 2, "job_priority": "p1", "disable_version_check": True, "automount": False}
    job = job_appliance(
        Cerebras(**chosen, mount_dirs=("/a",), compile_dir="mine", csx_micro_batch_size="32"), [], compile_only=True
    )
    assert job["cluster"] == {**chosen, "mount_dirs": ["/a"], "job_labels": []}
    assert (job["compile_dir"], job["micro_batch_size"], job["compile_only"]) == ("mine", 32, True)


@pytest.mark.parametrize(
    ("target", "first", "loss", "is_right"),
    [
        ("csx", 2.0, 2.05, True),
        ("csx", 2.0, 2.07, False),
        ("csx", 0.02, 0.027, True),
        ("csx", 0.02, 0.05, False),
        ("cpu", 0.02, 0.027, False),
        ("csx", 2.0, float("nan"), False),
    ],
)
def test_a_small_first_loss_may_differ_by_the_noise_of_half_precision(
    target: str, first: float, loss: float, is_right: bool
) -> None:
    from trainables.cerebras_backend import CerebrasTraining

    check = CerebrasTraining(Cerebras(target)).check_first_loss(first, "float32")
    if is_right:
        check(loss)
    else:
        with pytest.raises(RunError, match="must be the pruned one"):
            check(loss)


def test_waiting_for_the_appliance_is_no_time_of_training() -> None:
    from test_cerebras_stages import COLD

    from trainables.cerebras_backend import tell_stages_apart
    from trainables.training import Training
    from tune_sparse.cerebras.stages import read_stages
    from tune_sparse.training.loop import Step

    training, before = Training(), 57.5 * 60 + 7.9 * 60
    for step in (1, 2, 3):
        training.add(Step(step, 1.0, 0.1, 128, 1280, 4.0 + (before if step == 1 else 0)), cold=step <= 2)
    tell_stages_apart(training, read_stages(COLD), None)
    assert training.seconds == pytest.approx(12, abs=4)
    assert training.rates()["train_examples_per_second"] == pytest.approx(32)
    assert training.appliance["compile_seconds"] == pytest.approx(57.5 * 60, abs=3)


def test_the_next_start_ends_what_was_left_over(llama: Path, site: Path, ledger: Ledger) -> None:
    from trainables.pipeline import run_cell
    from trainables.worker import WorkerCache

    (site / "fault").write_text("hang")
    run = cerebras_run(llama)
    steps = run_cell(run, ledger, WorkerCache())
    while next(steps) is None:
        pass
    assert is_guarded(job_folder(ledger, run))
    assert list(end_leftovers(ledger, Cerebras("cpu"))) == []
    assert not is_guarded(job_folder(ledger, run))
    steps.close()


def test_target_and_release_are_part_of_the_identity_of_cerebras_cells_alone(llama: Path) -> None:
    run = cerebras_run(llama)
    others = [replace(run, cerebras=ON_CPU | changed) for changed in ({"target": "csx"}, {"release": "2.9.0"})]
    assert len({run.identity, *(other.identity for other in others)}) == 3
    plain = tiny_run(llama)
    assert "cerebras" not in plain._identified()
    assert Run.from_config(run.as_config()) == run
