"""What becomes of runs whose worker fails, through the real Tune: trials here do nothing but fail as told."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from factories import make_cell, make_run
from ray import cloudpickle, tune
from ray.exceptions import RayTaskError

from tune_sparse.config import SweepConfig
from tune_sparse.errors import is_out_of_memory
from tune_sparse.ledger.lease import FolderLease
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.callbacks import LedgerCallback, _error_record, read_error
from tune_sparse.sweep.progress import Progress
from tune_sparse.sweep.ray_session import capacity, nodes, run_trials
from tune_sparse.sweep.resources import Placement
from tune_sparse.sweep.scheduler import ResourceQueue
from tune_sparse.sweep.sources import Listed
from tune_sparse.sweep.tune_parts import Stop
from tune_sparse.tracking.background import BackgroundTracker
from tune_sparse.tracking.sync import default_uri
from tune_sparse.watchdog import HangReport

pytestmark = pytest.mark.xdist_group("machine")


def failing() -> type[tune.Trainable]:
    """A trial ends as the name of its model says. Sent to workers by value: they cannot import this file."""

    class Failing(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.trial = config["trial"]

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.trial = new_config["trial"]
            return True

        def step(self) -> dict[str, Any]:
            run, began = Run.from_config(self.trial["run"]), time.time()
            cpus = self.trial["resources"]["CPU"]
            folder, ending = Path(self.trial["results_dir"]), run.cell.model
            time.sleep(0.3)
            with (folder / f"{ending}{run.cell.seed}.tries").open("a") as tries:
                tries.write(f"{began} {time.time()} {cpus}\n")
            if ending == "lost":
                os._exit(1)
            if ending == "crowded" or (ending == "large" and cpus < 2):
                raise MemoryError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
            if ending == "full":
                raise OSError("[Errno 28] No space left on device")
            Ledger(folder).write_record(run, Record(run.run_id, run.identity, "done", measured={"trial_seconds": 0.3}))
            return {"done": True, "run_id": run.run_id, "step": 1, "steps": 1}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

    return Failing


@dataclass(frozen=True)
class Ended:
    ledger: Ledger
    runs: list[Run]
    stopped: str | None

    def tries(self, run: Run) -> list[list[float]]:
        lines = (self.ledger.folder / f"{run.cell.model}{run.cell.seed}.tries").read_text().splitlines()
        return [[float(part) for part in line.split()] for line in lines]

    def status(self, run: Run) -> str:
        record = self.ledger.record(run.run_id)
        assert record is not None
        return record.status


def sweep(folder: Path, *endings: str, retries: int = 2) -> Ended:
    ledger = Ledger(folder)
    runs = [make_run(make_cell(model=ending, seed=seed)) for seed, ending in enumerate(endings)]
    config = SweepConfig(models=("tiny",), results_dir=folder, max_retries=retries)
    placement, stop = Placement(config, nodes), Stop()

    def make_trial(run: Run) -> dict[str, Any]:
        return {"run": run.as_config(), "results_dir": str(folder), "resources": placement.resources(run)}

    queue = ResourceQueue({"torch": Listed(runs)}, make_trial, capacity, stop=stop)
    with FolderLease(folder) as lease:
        progress = Progress(len(runs), 0)
        callback = LedgerCallback(
            ledger,
            {run.run_id: run for run in runs},
            {},
            progress,
            BackgroundTracker(ledger, default_uri(folder), lambda tracker: None),
            lease,
            stop,
            placement,
            requeue=lambda run: queue.requeue("torch", run),
            max_retries=retries,
        )
        with progress.shown(2):
            run_trials(failing(), queue, callback, stop)
    return Ended(ledger, runs, stop.reason)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Ended:
    """A sweep with a trial for each way of failing, and some that go well."""
    folder = tmp_path_factory.mktemp("failing")
    return sweep(folder, "large", "lost", "well", "crowded", "well", "well")


def test_out_of_memory_is_tried_again_alone_on_more(ended: Ended) -> None:
    large = ended.runs[0]
    assert ended.status(large) == "done"
    [first, second] = ended.tries(large)
    assert (first[2], second[2]) == (1, 2), "CPUs that the trial held"
    began, finished, _ = second
    others = [span for run in ended.runs if run is not large for span in ended.tries(run)]
    assert not any(start < finished and began < end for start, end, _ in others)


def test_out_of_memory_alone_is_final(ended: Ended) -> None:
    crowded = ended.runs[3]
    assert [cpus for *_, cpus in ended.tries(crowded)] == [1, 2]
    record = ended.ledger.record(crowded.run_id)
    assert record is not None
    assert record.error is not None
    assert record.error["class"] == "MemoryError"
    assert not record.error["retryable"]
    assert record.error["device_memory_bytes"] == psutil.virtual_memory().total


def test_a_lost_worker_is_tried_again_as_often_as_allowed(ended: Ended) -> None:
    lost = ended.runs[1]
    assert len(ended.tries(lost)) == 1 + 2
    assert ended.status(lost) == "failed"


def test_the_others_ran_once_and_earlier_failures_are_kept(ended: Ended) -> None:
    for well in (ended.runs[2], *ended.runs[4:]):
        assert ended.status(well) == "done"
        assert len(ended.tries(well)) == 1
    assert ended.stopped is None
    aside = [path.name.rsplit("_", 1)[0] for path in (ended.ledger.folder / "set_aside").iterdir()]
    assert sorted(aside) == sorted([ended.runs[0].run_id, ended.runs[3].run_id, *[ended.runs[1].run_id] * 2])


def test_a_full_disk_stops_the_sweep_and_nothing_is_tried_again(tmp_path: Path, local_ray: None) -> None:
    ended = sweep(tmp_path, "full")
    assert ended.stopped is not None
    assert "the results folder can no longer be written" in ended.stopped
    assert len(ended.tries(ended.runs[0])) == 1


@pytest.mark.parametrize(
    ("error", "crowded"),
    [
        ({"class": "OutOfMemoryError", "message": "CUDA out of memory. Tried to allocate 2.00 GiB"}, True),
        ({"class": "RuntimeError", "message": "[enforce fail] DefaultCPUAllocator: can't allocate memory"}, True),
        ({"class": "ActorDiedError", "message": "killed due to the node running low on memory."}, True),
        (
            {"class": "RuntimeError", "message": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"},
            True,
        ),
        ({"class": "RuntimeError", "message": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"}, True),
        ({"class": "RuntimeError", "message": "HIP error: hipErrorOutOfMemory"}, True),
        ({"class": "DistBackendError", "message": "NCCL error: Failed to CUDA calloc 6291456 bytes"}, True),
        ({"class": "OSError", "message": "[Errno 12] Cannot allocate memory"}, True),
        ({"class": "TooLargeError", "message": "a device must hold a cell"}, True),
        ({"class": "RuntimeError", "message": "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"}, False),
        ({"class": "ActorDiedError", "message": "The actor died: its node was lost."}, False),
    ],
)
def test_out_of_memory_has_many_names(error: dict[str, str], crowded: bool) -> None:
    assert is_out_of_memory(error) == crowded


def test_the_error_of_a_trial_is_the_one_that_its_worker_raised(tmp_path: Path) -> None:
    path = tmp_path / "error.pkl"
    raised = RayTaskError("step", "Traceback ...\nOSError: No space left on device", OSError("No space left on device"))
    path.write_bytes(cloudpickle.dumps(raised))
    error = _error_record(read_error(SimpleNamespace(pickled_error_file=str(path))))
    assert error["class"] == "OSError"
    assert error["message"] == "OSError: No space left on device"
    assert "OSError: No space left on device" in error["traceback"]
    assert error["retryable"]


def test_a_trial_without_an_error_lost_its_worker(tmp_path: Path) -> None:
    for nowhere in (None, str(tmp_path / "error.pkl")):
        assert _error_record(read_error(SimpleNamespace(pickled_error_file=nowhere)))["class"] == "WorkerLost"


def test_a_worker_that_hung_says_for_how_long_and_where() -> None:
    error = _error_record(RuntimeError("The actor died"), HangReport("0:30:00", "matmul (x.py:7)", "Thread 0x1 ..."))
    assert error["message"] == "no progress for 0:30:00, in matmul (x.py:7)"
    assert (error["class"], error["traceback"], error["retryable"]) == ("Hang", "Thread 0x1 ...", True)
