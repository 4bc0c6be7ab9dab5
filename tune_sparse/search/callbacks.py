"""Answers of a search when Ray Tune says that a candidate reported, ended or failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tune_sparse.search.journal import SearchJournal, configuration_key
from tune_sparse.search.searcher import JournaledSearcher
from tune_sparse.sweep.callbacks import read_error
from tune_sparse.sweep.tune_parts import Stop, Unsaved


class RacingScheduler(Unsaved, FIFOScheduler):
    """Stops a candidate as soon as the search calls it beaten."""

    def __init__(self, search: JournaledSearcher) -> None:
        super().__init__()
        self._search = search

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["error"] is None and self._search.is_beaten(trial.trial_id, result["correctness"]):
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE


class SearchCallback(Unsaved, tune.Callback):
    """Says now and then how a search goes. A candidate whose worker fails is suggested again, at most `max_retries`
    times; then the search ends."""

    def __init__(
        self,
        search: JournaledSearcher,
        journal: SearchJournal,
        budget: int,
        stop: Stop,
        max_retries: int,
        report: Callable[[str], None],
    ) -> None:
        self._search, self._journal, self._budget = search, journal, budget
        self._stop, self._max_retries, self._report = stop, max_retries, report
        self._retries: Counter[str] = Counter()
        self._next = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._journal.completed >= self._next:
            stopped = sum(s.state == "stopped" for s in self._journal.suggestions)
            self._report(f"{self._journal.completed} candidates of {self._budget}, {stopped} of them stopped early")
            self._next = self._journal.completed + max(1, self._budget // 5)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ranks = trial.config["trial"]["ranks"]
        self._retries[configuration_key(ranks)] += 1
        if self._retries[configuration_key(ranks)] <= self._max_retries:
            self._search.requeue(ranks)
            return
        lines = [line for line in str(read_error(trial) or "").splitlines() if line.strip()]
        self._stop.because(lines[-1] if lines else "a worker process ended unexpectedly")
