"""What a search over trainings suggests to Ray Tune: Optuna's points as runs of the ledger, from a journal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from tune_sparse.errors import InputError, RunError
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.run import Run
from tune_sparse.search.journal import Journal
from tune_sparse.search.tuning_config import OBJECTIVES
from tune_sparse.search.tuning_space import Point
from tune_sparse.search.tuning_trial import Trial
from tune_sparse.sweep.early_stopping import EarlyStopper
from tune_sparse.sweep.retries import is_missing
from tune_sparse.sweep.tune_parts import Stop, Unsaved


class TrainingSearcher(Unsaved, Searcher):
    """A sampler with a memory. What the ledger knows of a run is told without a trial.

    run_at: the run of a point. runs: filled with those that were suggested. make_trial: the settings of a run's trial.
    """

    def __init__(
        self,
        sampler: Searcher,
        journal: Journal[Trial],
        objectives: Sequence[str],
        run_at: Callable[[Point], Run],
        runs: dict[str, Run],
        ledger: LedgerReader,
        stopper: EarlyStopper | None,
        make_trial: Callable[[Run], dict[str, Any]],
        budget: int,
        stop: Stop,
    ) -> None:
        super().__init__()
        self._sampler, self._journal, self._objectives, self._run_at = sampler, journal, objectives, run_at
        self._runs, self._ledger, self._stopper = runs, ledger, stopper
        self._make_trial, self._budget, self._stop = make_trial, budget, stop
        self._running: dict[str, tuple[Trial, Run]] = {}
        self._ended: list[tuple[Trial, Run]] = []
        self._again: set[str] = set()
        self._replay()
        self._open = deque(journal.open())

    def _replay(self) -> None:
        for is_asking, trial in self._journal.events():
            if not is_asking:
                self._tell_sampler(trial)
            elif (point := self._sampler.suggest(str(trial.number))) != trial.point:
                raise RunError(
                    f"a sampler must suggest again what it suggested, {trial.point} in trial {trial.number}, got "
                    f"{point}. Continue with the version of Optuna that began."
                )

    def suggest(self, trial_id: str) -> Any:
        """A config for Ray, None while it must wait, or that the search has ended."""
        self.settle()
        while not self._stop.reason:
            trial = self._open.popleft() if self._open else self._ask()
            if trial is None:  # one that runs may be lost, and suggested again
                return None if self._running else Searcher.FINISHED
            try:
                run = self._run_at(trial.point)
            except InputError as error:
                self._tell(trial, state="failed", error=str(error))
                continue
            if any(run.run_id == other.run_id for _, other in self._running.values()):
                self._open.appendleft(trial)
                return None
            self._runs[run.run_id] = run
            if not self._tell_known(trial, run):
                self._running[trial_id] = trial, run
                return {"trial": self._make_trial(run)}
        return Searcher.FINISHED

    def _ask(self) -> Trial | None:
        asked = len(self._journal.suggestions)
        return self._journal.ask(self._sampler.suggest(str(asked))) if asked < self._budget else None

    def requeue(self, run: Run) -> None:
        """Suggest a run once more, whose worker was lost."""
        self._again.add(run.run_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler has seen it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._running:
            self._ended.append(self._running.pop(trial_id))

    def settle(self) -> None:
        """Tell what became of the trials that ended, once their records are written."""
        for trial, run in self._ended:
            if run.run_id in self._again:
                self._again.remove(run.run_id)
                self._open.append(trial)
            elif not self._tell_known(trial, run):
                record = self._ledger.record(run.run_id)
                if record is not None and record.error is not None:  # it may pass, but has had its retries
                    self._tell(trial, state="failed", run_id=run.run_id, error=record.error["message"])
        self._ended = []

    def _tell_known(self, trial: Trial, run: Run) -> bool:
        """Tell what is settled of a run; returns whether anything is."""
        record, named = self._ledger.record(run.run_id), {"run_id": run.run_id}
        if record is not None and record.status == "done":
            values = {name: OBJECTIVES[name].value(record.metrics) for name in self._objectives}
            self._tell(trial, state="done", values=values, **named)
        elif self._stopper is not None and self._stopper.is_stopped(run.run_id):
            stopped = self._stopper.record(run).stopped
            assert stopped is not None
            value = stopped["values"][str(stopped["step"])]
            self._tell(trial, state="stopped", stopped={"step": stopped["step"], "value": value}, **named)
        elif record is not None and record.error is not None and not is_missing(record):
            self._tell(trial, state="failed", error=record.error["message"], **named)
        else:
            return False
        return True

    def _tell(self, trial: Trial, **found: Any) -> None:
        self._tell_sampler(self._journal.tell(trial.number, **found))

    def _tell_sampler(self, trial: Trial) -> None:
        """Optuna calls a stopped one pruned: with one objective it learns from the loss at the last rung."""
        name = str(trial.number)
        if trial.stopped is not None and len(self._objectives) == 1:
            step = trial.stopped["step"]
            self._sampler.on_trial_result(name, {"loss": trial.stopped["value"], "training_iteration": step})
        self._sampler.on_trial_complete(name, trial.values, error=trial.state == "failed")
