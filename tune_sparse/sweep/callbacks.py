"""Answers of the driver when Ray Tune says that a trial started, reported, ended or failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune

from tune_sparse.errors import DISK_FULL, is_out_of_memory
from tune_sparse.ledger.lease import FolderLease
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.progress import Progress
from tune_sparse.sweep.resources import Placement
from tune_sparse.sweep.retries import describe_machine
from tune_sparse.sweep.tune_parts import Stop, Unsaved
from tune_sparse.tracking.background import BackgroundTracker
from tune_sparse.watchdog import HangReport, read_hang_report


class LedgerCallback(Unsaved, tune.Callback):
    """Shows and tracks each run as it ends, and records the runs that a worker could not record itself.

    points: {run: its values of the sweep's axes}, for the screen. requeue: is given a run whose infrastructure failed,
    at most `max_retries` times.
    """

    def __init__(
        self,
        ledger: Ledger,
        runs: Mapping[str, Run],
        points: Mapping[str, str],
        progress: Progress,
        tracker: BackgroundTracker,
        lease: FolderLease,
        stop: Stop,
        placement: Placement,
        requeue: Callable[[Run], None],
        max_retries: int,
    ) -> None:
        self._ledger, self._runs, self._points, self._progress = ledger, runs, points, progress
        self._tracker, self._lease, self._stop = tracker, lease, stop
        self._placement, self._requeue, self._max_retries = placement, requeue, max_retries
        self._started: set[str] = set()
        self._retries: Counter[str] = Counter()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run_id = _run_id(trial)
        cell = self._runs[run_id].cell
        self._started.add(run_id)
        label = f"{cell.model} {cell.task} {cell.method} {cell.sparsity:g} {cell.trained_by}"
        self._progress.started(run_id, f"{label} {self._points.get(run_id, '')}".rstrip())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._lease.lost.is_set():
            self._stop.because("another process took over the results folder: this one was silent for too long")
        self._progress.reported(result["run_id"], result["step"], result["steps"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._ledger.record(_run_id(trial))
        if record is not None:
            self._placement.learn(self._runs[record.run_id], record)
            self._end(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record what the worker could not: it was lost, or it could not write."""
        run = self._runs[_run_id(trial)]
        earlier = self._ledger.record(run.run_id)
        if earlier is not None and earlier.status == "done":  # it was lost after it had written its last file
            self._end(earlier)
            return
        error = _error_record(read_error(trial), read_hang_report(self._ledger.hang_report(run.run_id)))
        if is_out_of_memory(error) and self._placement.is_alone(run):
            error |= {"retryable": False} | describe_machine()
        record = Record(run.run_id, run.identity, "failed", error=error)
        try:
            self._ledger.write_record(run, record)
        except OSError as broken:
            self._stop.because(f"the results folder can no longer be written: {broken}")
        if any(message in error["message"] for message in DISK_FULL):
            self._stop.because(f"the results folder can no longer be written: {error['message']}")
        if not self._stop.reason and self._may_try_again(run, error):
            self._retries[run.run_id] += 1
            self._progress.requeued(record)
            self._requeue(run)
        else:
            self._end(record)

    def _may_try_again(self, run: Run, error: Mapping[str, Any]) -> bool:
        """Out of memory with a node for itself is final, whatever is left of the retries."""
        has_more = not is_out_of_memory(error) or self._placement.give_more(run)
        return has_more and self._retries[run.run_id] < self._max_retries

    def _end(self, record: Record) -> None:
        self._progress.ended(record)
        self._tracker.add(record.run_id)

    def record_unfinished(self) -> None:
        """Record as interrupted what was started and has no record."""
        for run_id in self._started:
            if self._ledger.record(run_id) is None:
                run = self._runs[run_id]
                with suppress(OSError):  # without a record it is missing, which means the same
                    self._ledger.write_record(run, Record(run_id, run.identity, "interrupted"))


def read_error(trial: Any) -> Exception | None:
    """The error that a trial ended in: Ray's own getter looks in a storage to which nothing was written yet."""
    path = trial.pickled_error_file
    return cloudpickle.loads(Path(path).read_bytes()) if path and Path(path).exists() else None


def _error_record(error: Exception | None, hang: HangReport | None = None) -> dict[str, Any]:
    """An error that a worker raised, or that Ray found when the worker was gone, or why it went."""
    if hang is not None:
        message = f"no progress for {hang.allowed}, in {hang.where}"
        return {"class": "Hang", "message": message, "traceback": hang.traceback, "retryable": True}
    lines = [line for line in str(error).splitlines() if line.strip()] if error else []
    cause = getattr(error, "cause", None) or error
    return {
        "class": type(cause).__name__ if cause else "WorkerLost",
        "message": lines[-1] if lines else "the worker process ended unexpectedly",
        "traceback": "\n".join(lines),
        "retryable": True,
    }


def _run_id(trial: Any) -> str:
    return Run.from_config(trial.config["trial"]["run"]).run_id
