"""Sweeps on torch and on Cerebras through the real Ray Tune, with a stand-in for the site's environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tune_sparse.cerebras.guard import is_guarded
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.tracking.entries import RUN_TAG, SWEEP_TAG
from tune_sparse.tracking.sync import EXPERIMENT, default_uri

pytestmark = pytest.mark.xdist_group("machine")

PATIENCE_SECONDS = 240
FEW = ["--tasks", "boolq", "--methods", "unstructured", "--sparsities", "0.5", "--set", "steps=12", "n_test=20"]


def started(model: Path, results: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tune_sparse", "sweep", "smoke", "--no-report", "--models", str(model), *FEW]
    command += ["--data-dir", "synthetic"]
    command += ["--cerebras-target", "cpu", "--results-dir", str(results), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the sweep did not get there"
        time.sleep(0.05)


def span(ledger: Ledger, run_id: str) -> tuple[float, float]:
    """When a run began and ended."""
    record = ledger.record(run_id)
    assert record is not None
    ended = (ledger.run_folder(run_id) / "result.json").stat().st_mtime
    return ended - record.measured["trial_seconds"], ended


@pytest.mark.slow
def test_both_kinds_run_at_once_into_one_ledger_under_one_parent(llama: Path, site: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    process = started(llama, results, "--backend", "torch", "cerebras", "--cs3", "2", "--workers", "2")
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, out + err
    ledger = Ledger(results)
    runs = sorted(path.name for path in (results / "runs").glob("[!.]*"))
    kinds = {kind: [run for run in runs if run.startswith(kind)] for kind in ("torch", "cerebras")}
    assert {kind: len(found) for kind, found in kinds.items()} == {"torch": 2, "cerebras": 2}
    first = {kind: min(span(ledger, run) for run in found) for kind, found in kinds.items()}
    assert first["cerebras"][0] < first["torch"][1]
    assert first["torch"][0] < first["cerebras"][1], "both kinds run from the start"
    assert len(list((results / "sweeps").glob("*.json"))) == 1

    client = MlflowClient(default_uri(results))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    tracked = client.search_runs([experiment.experiment_id])
    assert sum(SWEEP_TAG in run.data.tags for run in tracked) == 1
    assert sorted(run.data.tags[RUN_TAG] for run in tracked if RUN_TAG in run.data.tags) == runs


@pytest.mark.slow
def test_a_killed_worker_and_a_stop_leave_no_child_and_the_rest_runs_next_time(
    llama: Path, site: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    (site / "fault").write_text("hang")
    process = started(llama, results, "--backend", "cerebras", "--cs3", "2", "--workers", "2", "--max-retries", "0")
    until(lambda: len(list(results.glob("cerebras/*/start.mdl"))) == 2)
    folders = list(results.glob("cerebras/*"))
    [worker, *_] = [p for p in psutil.Process(process.pid).children(recursive=True) if "Trainable" in _command(p)]
    worker.kill()
    until(lambda: sum(is_guarded(folder) for folder in folders) <= 1)
    until(
        lambda: any(
            "WorkerLost" in p.read_text() or "died" in p.read_text() for p in results.glob("runs/*/result.json")
        )
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, out + err
    until(lambda: not any(is_guarded(folder) for folder in folders))
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(results) in " ".join(p.info["cmdline"] or [])]
    assert not list(results.glob("cerebras/*/start.mdl"))
    assert _statuses(results) == ["failed", "interrupted"]

    (site / "fault").unlink()
    process = started(llama, results, "--backend", "cerebras", "--cs3", "2", "--workers", "2")
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, out + err


@pytest.mark.slow
def test_a_full_disk_stops_the_sweep_and_leaves_nothing_that_runs(llama: Path, site: Path, small_disk: Path) -> None:
    results = small_disk / "results"
    (site / "fault").write_text("hang")
    process = started(llama, results, "--backend", "cerebras", "--cs3", "2", "--workers", "2")
    until(lambda: len(list(results.glob("cerebras/*/start.mdl"))) == 2)
    folders, ballast = list(results.glob("cerebras/*")), small_disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 16))
    for child in [p for p in psutil.process_iter() if "stand_in_cerebras" in _command(p)]:
        child.kill()  # as one that cannot write ends
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, out + err
    assert "No space left on device" in err.splitlines()[-1]
    until(lambda: not any(is_guarded(folder) for folder in folders))
    assert "done" not in _statuses(results)

    ballast.unlink()
    (site / "fault").unlink()
    process = started(llama, results, "--backend", "cerebras", "--cs3", "2", "--workers", "2")
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, out + err
    assert _statuses(results) == ["done", "done"]


def _statuses(results: Path) -> list[str]:
    """Of every run, in order."""
    return sorted(json.loads(path.read_text())["status"] for path in results.glob("runs/[!.]*/result.json"))


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_lowering_trains_nothing_so_that_no_other_backend_may_be_asked(llama: Path, site: Path, tmp_path: Path) -> None:
    process = started(llama, tmp_path / "results", "--backend", "torch", "cerebras", "--cerebras-target", "validate")
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert "cerebras_target validate trains nothing, so the only backend must be cerebras" in err


def test_a_csx_sweep_without_a_cluster_ends_before_it_trains(llama: Path, site: Path, tmp_path: Path) -> None:
    if os.path.exists("/opt/cerebras/config_v2"):
        pytest.skip("this machine knows a cluster")
    process = started(llama, tmp_path / "results", "--backend", "cerebras", "--cerebras-target", "csx")
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, out + err
    assert "training on a CS-3 needs a cluster, this machine knows none" in err
    assert not list((tmp_path / "results").glob("runs/*"))
