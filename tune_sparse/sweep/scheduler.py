"""Gives Ray Tune its next trial: one that the cluster has room for, whichever backend it is of."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.tune.search import Searcher

from tune_sparse.sweep.resources import describe_resources, fits
from tune_sparse.sweep.sources import Source
from tune_sparse.sweep.tune_parts import Stop, Unsaved

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the cluster's resources."""


@dataclass(frozen=True)
class RunningTrial:
    """A trial that Tune has."""

    queue: str
    held: Mapping[str, float]
    waits: bool
    """for another of its queue to end"""


class ResourceQueue(Unsaved, Searcher):
    """Hands out trials from queues, one for each kind of hardware, as there is room for them.

    No trial stands in the way of another queue's, and Tune never holds, or copies, more than what runs. Beside other
    queues a full queue has one trial wait in Tune: without it, Tune ends the queue's worker with its trial.

    queues: each decides what is next in it; the scarcest hardware comes first, which decides between queues that have
    as many trials. make_trial: makes the trial of an item, which has `resources`, when it is its turn. total: resources
    of the whole cluster. limit: trials at once, of a single queue. stop: ends it.
    """

    def __init__(
        self,
        queues: Mapping[str, Source],
        make_trial: Callable[[Any], dict[str, Any]],
        total: Callable[[], Mapping[str, float]],
        limit: int | None = None,
        stop: Stop | None = None,
    ) -> None:
        super().__init__()
        self._queues = queues
        self._make_trial, self._total, self._limit, self._stop = make_trial, total, limit, stop or Stop()
        self._running: dict[str, RunningTrial] = {}
        self._seen: Mapping[str, float] = {}
        self._looked, self._said = float("-inf"), False

    def suggest(self, trial_id: str) -> Any:
        if self._running and len(self._running) == self._limit and not self._stop.reason:
            return None
        items = {name: item for name, queue in self._queues.items() if (item := queue.peek()) is not None}
        if self._stop.reason or not (self._running or items):
            return Searcher.FINISHED
        heads = {name: self._make_trial(item) for name, item in items.items()}
        free, running = self._free(), Counter(trial.queue for trial in self._running.values())
        fitting = [name for name, trial in heads.items() if fits(trial["resources"], free)]
        has_room = bool(fitting)
        chosen = min(fitting or filter(self._may_wait, heads), key=running.__getitem__, default=None)
        if chosen is None:
            self._warn_if_stuck(heads.values())
            return None
        self._queues[chosen].take()
        self._running[trial_id] = RunningTrial(chosen, heads[chosen]["resources"], waits=not has_room)
        return {"trial": heads[chosen]}

    def _may_wait(self, name: str) -> bool:
        own = [trial for trial in self._running.values() if trial.queue == name]
        return len(own) < len(self._running) and any(own) and not any(trial.waits for trial in own)

    def _warn_if_stuck(self, heads: Iterable[Mapping[str, Any]]) -> None:
        needed = [describe_resources(trial["resources"]) for trial in heads]
        if needed and not self._running and not self._said:
            self._said = True
            logger.warning("waiting for a node with %s", " or ".join(needed))

    def requeue(self, queue: str, item: Any) -> None:
        """Hand `item` out once more, after the others of its queue."""
        self._queues[queue].put_back(item)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        ended = self._running.pop(trial_id, None)
        for other, trial in self._running.items():
            if ended and trial.queue == ended.queue and trial.waits:
                self._running[other] = replace(trial, waits=False)

    def _free(self) -> dict[str, float]:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._seen, self._looked = dict(self._total()), time.monotonic()
        free = dict(self._seen)
        for trial in self._running.values():
            for name, amount in trial.held.items() if not trial.waits else ():
                free[name] = free.get(name, 0) - amount
        return free
