"""What Ray Tune is given next: a trial that the cluster has room for, whichever backend it is of."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.tune.search import Searcher

from tune_sparse.sweep.callbacks import Stop
from tune_sparse.sweep.resources import describe_resources, fits

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the cluster's resources."""


@dataclass(frozen=True)
class Live:
    """A trial that Tune has."""

    lane: str
    held: Mapping[str, float]
    waits: bool
    """for another of its lane to end"""


class Dispatcher(Searcher):
    """Hands out trials from lanes, one for each kind of hardware, each in its own order, as there is room for them.

    No trial stands in the way of another lane's, and Tune never holds, or copies, more than what runs. Beside other
    lanes a full lane has one trial wait in Tune: without it, Tune ends the lane's worker with its trial.

    lanes: the scarcest hardware first, which decides between lanes that have as many trials. make_trial: the trial of
    an item, which has `resources`, asked for when it is its turn. total: resources of the whole cluster. limit: trials
    at once, of a single lane. stop: ends it.
    """

    def __init__(
        self,
        lanes: Mapping[str, Iterable[Any]],
        make_trial: Callable[[Any], dict[str, Any]],
        total: Callable[[], Mapping[str, float]],
        limit: int | None = None,
        stop: Stop | None = None,
    ) -> None:
        super().__init__()
        self._lanes = {name: deque(items) for name, items in lanes.items()}
        self._trial_of, self._total, self._limit, self._stop = make_trial, total, limit, stop or Stop()
        self._live: dict[str, Live] = {}
        self._seen: Mapping[str, float] = {}
        self._looked, self._said = float("-inf"), False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray saves what it would restore an experiment from, and ours is never restored."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        if self._stop.reason or not (self._live or any(self._lanes.values())):
            return Searcher.FINISHED
        if len(self._live) == self._limit:
            return None
        heads = {name: self._trial_of(lane[0]) for name, lane in self._lanes.items() if lane}
        free, live = self._free(), Counter(live.lane for live in self._live.values())
        fitting = [name for name, trial in heads.items() if fits(trial["resources"], free)]
        has_room = bool(fitting)
        chosen = min(fitting or filter(self._may_wait, heads), key=live.__getitem__, default=None)
        if chosen is None:
            self._warn_if_stuck(heads.values())
            return None
        self._lanes[chosen].popleft()
        self._live[trial_id] = Live(chosen, heads[chosen]["resources"], waits=not has_room)
        return {"trial": heads[chosen]}

    def _may_wait(self, name: str) -> bool:
        own = [live for live in self._live.values() if live.lane == name]
        return len(own) < len(self._live) and any(own) and not any(live.waits for live in own)

    def _warn_if_stuck(self, heads: Iterable[Mapping[str, Any]]) -> None:
        needed = [describe_resources(trial["resources"]) for trial in heads]
        if needed and not self._live and not self._said:
            self._said = True
            logger.warning("waiting for a node with %s", " or ".join(needed))

    def again(self, lane: str, item: Any) -> None:
        """Hand `item` out once more, after the others of its lane."""
        self._lanes[lane].append(item)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        ended = self._live.pop(trial_id, None)
        for other, live in self._live.items():
            if ended and live.lane == ended.lane and live.waits:
                self._live[other] = replace(live, waits=False)

    def _free(self) -> dict[str, float]:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._seen, self._looked = dict(self._total()), time.monotonic()
        free = dict(self._seen)
        for live in self._live.values():
            for name, amount in live.held.items() if not live.waits else ():
                free[name] = free.get(name, 0) - amount
        return free

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger knows what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""
