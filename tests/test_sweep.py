"""Sweeps through the real Ray Tune: finished, resumed, killed, stopped, and failing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from patience import held_sweep
from safetensors.torch import load_file, save_file

from analysis.read.load import cells_table
from tune_sparse.cli import main
from tune_sparse.files import read_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.tracking.entries import RUN_TAG, SWEEP_TAG
from tune_sparse.tracking.sync import EXPERIMENT, default_uri

pytestmark = pytest.mark.xdist_group("machine")

PATIENCE_SECONDS = 240
FEW = ["steps=12", "eval_every=6", "n_selection=16", "n_test=40"]


@dataclass
class Driver:
    """A sweep as a user starts it: a process of its own, writing to one results folder."""

    arguments: list[str]
    results: Path

    def start(self, program: Sequence[str] = (sys.executable, "-m", "tune_sparse")) -> subprocess.Popen[str]:
        command = [*program, "sweep", *self.arguments, "--results-dir", str(self.results)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_held(self, done: int) -> subprocess.Popen[str]:
        """Its runs wait in their midst once so many are done, until `release`."""
        self.hold.touch()
        return self.start(held_sweep(self.hold, done))

    @property
    def hold(self) -> Path:
        return self.results.with_name("hold")

    def release(self) -> None:
        self.hold.unlink()

    def is_in_the_midst(self, done: int) -> bool:
        """Whether so many runs are done and two train."""
        training = [path for path in self.results.glob("runs/.*/metrics.jsonl") if path.stat().st_size]
        return len(self.done()) >= done and len(training) == 2

    def run(self) -> tuple[int, str]:
        """Exit status, and everything that was printed."""
        process = self.start()
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, out + err

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.results)

    def done(self) -> set[str]:
        runs = (self.results / "runs").glob("[!.]*")
        return {path.name for path in runs if self.ledger.is_done(path.name)}

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "the sweep did not get there"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def smoke(llama: Path) -> list[str]:
    """The smoke sweep, of few steps and examples, on a model that needs no minutes of base training."""
    return ["smoke", "--data-dir", "synthetic", "--models", str(llama), "--no-report", "--set", *FEW]


@pytest.fixture(scope="module")
def finished(smoke: list[str], tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """An undisturbed smoke sweep."""
    driver = Driver(smoke, tmp_path_factory.mktemp("finished") / "results")
    status, printed = driver.run()
    assert status == 0, printed
    assert re.search(r"Results: after tuning.*\nmodel +task .* before after ", printed), "and without a report, too"
    return driver


def compute_metrics(driver: Driver) -> dict[str, dict[str, object]]:
    return {run_id: record.metrics for run_id in driver.done() if (record := driver.ledger.record(run_id))}


def tracked(driver: Driver) -> list[str]:
    """Run tags of all children in MLflow."""
    client = MlflowClient(default_uri(driver.results))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert sum(SWEEP_TAG in run.data.tags for run in runs) == 1
    return sorted(run.data.tags[RUN_TAG] for run in runs if RUN_TAG in run.data.tags)


def test_every_cell_is_served_by_a_verified_run(finished: Driver) -> None:
    cells = cells_table([finished.results])
    assert len(cells) == 24
    assert set(cells["status"]) == {"done"}
    assert cells["run_id"].nunique() == 14
    assert cells["shared_with"].notna().sum() == 10
    for run_id in cells["run_id"].unique():
        report = read_json(finished.ledger.run_folder(run_id) / "validation_report.json")
        assert report["all_valid"]
        assert report["max_abs_at_masked"] == 0


def test_a_shared_cell_points_to_the_cell_that_owns_the_run(finished: Driver) -> None:
    cells = cells_table([finished.results]).set_index("cell_id")
    for cell in cells[cells["shared_with"].notna()].itertuples():
        assert cells.loc[cell.shared_with, "run_id"] == cell.run_id
        assert cell.sparsity == 0


def test_a_run_folder_holds_what_the_design_promises(finished: Driver) -> None:
    promised = {
        "config.yaml",
        "sparse_config.json",
        "result.json",
        "validation_report.json",
        "train.log",
        "metrics.jsonl",
        "git_sha.txt",
        "examples.parquet",
        "adapter",
    }
    for run_id in finished.done():
        assert promised <= {path.name for path in finished.ledger.run_folder(run_id).iterdir()}


def test_sparse_to_dense_records_what_the_last_mask_removed(finished: Driver) -> None:
    for run_id, metrics in compute_metrics(finished).items():
        if "sparse-to-dense" in run_id:
            assert metrics["update_removed_fraction"] > 0
            assert metrics["accuracy_before_merge"] is not None
        else:
            assert "update_removed_fraction" not in metrics


def test_the_modes_train_differently(finished: Driver) -> None:
    losses = {
        mode: [
            metrics["train_loss"]
            for run_id, metrics in sorted(compute_metrics(finished).items())
            if mode in run_id and ("unstructured" in run_id or "random" in run_id)
        ]
        for mode in ("sparse-to-dense", "sparse-to-sparse")
    }
    assert len(losses["sparse-to-dense"]) == 4
    assert not set(losses["sparse-to-dense"]) & set(losses["sparse-to-sparse"])


def test_mlflow_has_each_training_once(finished: Driver) -> None:
    assert tracked(finished) == sorted(finished.done())


def test_the_same_sweep_again_runs_nothing_and_writes_the_report_that_was_not_wanted(finished: Driver) -> None:
    before = {run_id: finished.ledger.record(run_id) for run_id in finished.done()}
    assert not (finished.results / "analysis").exists()
    status, printed = Driver([part for part in finished.arguments if part != "--no-report"], finished.results).run()
    assert status == 0, printed
    assert (finished.results / "analysis" / "findings.md").is_file()
    assert "0 trainings in" in printed
    assert re.search(r"^(a|every cell): \w", printed, re.MULTILINE), "warnings, once the audit has run"
    assert before == {run_id: finished.ledger.record(run_id) for run_id in finished.done()}


@pytest.mark.slow
def test_one_worker_and_another_order_give_the_same_bits(finished: Driver, results: Path) -> None:
    reversed_axes = ["--methods", "random", "structured", "--tasks", "gsm8k", "--workers", "1"]
    other = Driver([*finished.arguments, *reversed_axes], results)
    status, printed = other.run()
    assert status == 0, printed
    expected = compute_metrics(finished)
    found = compute_metrics(other)
    assert len(found) == 5
    assert found == {run_id: expected[run_id] for run_id in found}


def test_a_killed_sweep_resumes_with_what_was_missing(finished: Driver, smoke: list[str], results: Path) -> None:
    driver = Driver(smoke, results)
    process = driver.start_held(5)
    driver.wait_until(lambda: driver.is_in_the_midst(5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    driver.release()
    time.sleep(3)  # workers that outlive the driver may still finish the run they were at
    kept = {run_id: (driver.ledger.run_folder(run_id) / "result.json").stat().st_mtime_ns for run_id in driver.done()}
    assert 5 <= len(kept) < 14

    status, printed = driver.run()

    assert status == 0, printed
    assert f"{14 - len(kept)} trainings in" in printed
    for run_id, written in kept.items():
        assert (driver.ledger.run_folder(run_id) / "result.json").stat().st_mtime_ns == written
    assert compute_metrics(driver) == compute_metrics(finished)
    assert {driver.ledger.record(r).identity for r in driver.done()} == {
        finished.ledger.record(r).identity for r in finished.done()
    }
    assert tracked(driver) == sorted(finished.done())
    assert not list(driver.results.glob("*/.*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_cleanly_and_the_rest_runs_next_time(
    smoke: list[str], results: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = Driver(smoke, results)
    process = driver.start_held(0)
    driver.wait_until(lambda: driver.is_in_the_midst(0))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not list(driver.results.glob("*/.*.partial"))
    assert not (driver.results / "lease.json").exists()
    statuses = cells_table([driver.results]).drop_duplicates("run_id")["status"]
    assert sorted(statuses) == ["interrupted"] * 2 + ["missing"] * 12
    assert main(["sweep", *smoke, "--results-dir", str(driver.results), "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["missing"]) == 14


@pytest.mark.slow
def test_a_killed_worker_costs_one_retry(smoke: list[str], results: Path) -> None:
    driver = Driver([*smoke, "--tasks", "boolq", "--methods", "random"], results)
    process = driver.start_held(1)
    driver.wait_until(lambda: driver.is_in_the_midst(1))
    [worker, *_] = [p for p in psutil.Process(process.pid).children(recursive=True) if _is_training(p)]
    worker.kill()
    driver.release()
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, out + err
    assert set(cells_table([driver.results])["status"]) == {"done"}


@pytest.mark.slow
def test_a_full_disk_stops_the_sweep_with_its_reason_and_the_rest_runs_next_time(
    smoke: list[str], small_disk: Path
) -> None:
    driver = Driver([*smoke, "--tasks", "boolq", "--methods", "random", "unstructured"], small_disk / "results")
    process = driver.start_held(1)
    driver.wait_until(lambda: driver.is_in_the_midst(1))
    ballast = small_disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 16))
    driver.release()
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, out + err
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    done = driver.done()
    assert 1 <= len(done) < 5

    ballast.unlink()
    status, printed = driver.run()
    assert status == 0, printed
    assert len(driver.done()) == 5


def _is_training(process: psutil.Process) -> bool:
    try:
        return "Trainable" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_a_cell_whose_loss_is_not_finite_fails_alone(llama: Path, tmp_path: Path, results: Path) -> None:
    """One weight is so large that the model overflows wherever the mask keeps it: magnitude always, random not."""
    model = tmp_path / "overflowing"
    model.mkdir()
    for path in llama.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name][0, _position_that_random_prunes(weights[name], name)] = 3e38
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    few = ["--tasks", "boolq", "--methods", "unstructured", "random", "--sparsities", "0.5", "--set", "steps=3"]
    driver = Driver(["smoke", "--data-dir", "synthetic", "--models", str(model), "--no-report", *few], results)
    status, printed = driver.run()

    assert status == 1
    cells = cells_table([driver.results]).set_index("method")
    assert set(cells.loc["random", "status"]) == {"done"}
    assert set(cells.loc["unstructured", "status"]) == {"failed"}
    assert all(re.search("must (be|stay) finite, got", error) for error in cells.loc["unstructured", "error"])
    assert cells.loc["unstructured", "accuracy"].isna().all()
    assert "failed: torch_overflowing_boolq_unstructured" in printed

    assert "0 trainings in" in driver.run()[1]


def _position_that_random_prunes(weight: torch.Tensor, name: str) -> int:
    from tune_sparse.pruning.masks import keep_highest, pruned_count
    from tune_sparse.pruning.scores import ScoreInputs, random

    keep = keep_highest(random(weight, ScoreInputs(name)), pruned_count(weight.numel(), 0.5))
    return int((~keep[0]).nonzero()[0])


def test_results_folder_environment_is_recorded(finished: Driver) -> None:
    record = finished.ledger.record(next(iter(finished.done())))
    assert record is not None
    assert record.environment["packages"]["torch"] == torch.__version__
    assert record.environment["hardware"]
    assert os.path.exists(default_uri(finished.results).removeprefix("sqlite:///"))
