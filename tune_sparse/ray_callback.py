"""What the driver does when Ray Tune says that a trial started, reported, ended or failed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ray import tune

from tune_sparse.holder import Holder
from tune_sparse.progress import Progress
from tune_sparse.result import Ledger, Record, Run
from tune_sparse.tracking import BackgroundTracker


class LedgerCallback(tune.Callback):
    """Shows and tracks each run as it ends, and records the runs that a worker could not record itself."""

    def __init__(
        self,
        ledger: Ledger,
        runs: Mapping[str, Run],
        progress: Progress,
        tracker: BackgroundTracker,
        holder: Holder,
    ) -> None:
        self._ledger, self._runs, self._progress = ledger, runs, progress
        self._tracker, self._holder = tracker, holder
        self._started: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray saves its callbacks to restore an experiment, and ours is never restored."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._holder.lost.is_set():
            raise RuntimeError("another process took over the results folder, because this one was silent for too long")
        run_id = _run_id(trial)
        self._started.add(run_id)
        cell = self._runs[run_id].cell
        self._progress.started(run_id, f"{cell.model} {cell.task} {cell.method} {cell.sparsity:g} {cell.mode}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._progress.reported(result["run_id"], result["step"], result["steps"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run_id = _run_id(trial)
        record = self._ledger.record(run_id)
        if record is not None:
            self._progress.ended(record)
            self._tracker.add(run_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run = self._runs[_run_id(trial)]
        error = trial.get_error()
        description = {
            "class": type(error).__name__,
            "message": str(error).strip().splitlines()[-1] if str(error).strip() else "the worker was lost",
            "traceback": str(error),
            "retryable": True,
        }
        record = Record(run.run_id, run.identity, "failed", error=description)
        self._ledger.write_record(run, record)
        self._progress.ended(record)
        self._tracker.add(run.run_id)

    def record_unfinished(self) -> None:
        """Record as interrupted what was started and has no record."""
        for run_id in self._started:
            if self._ledger.record(run_id) is None:
                run = self._runs[run_id]
                self._ledger.write_record(run, Record(run_id, run.identity, "interrupted"))


class StopWhenSet(tune.Stopper):
    """Ends the experiment once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as for the callback."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._event.is_set()

    def stop_all(self) -> bool:
        return self._event.is_set()


def _run_id(trial: Any) -> str:
    return Run.from_config(trial.config["trial"]["run"]).run_id
