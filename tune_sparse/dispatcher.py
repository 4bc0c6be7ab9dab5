"""What Ray Tune is given next: a trial that the cluster has room for, whichever backend it is of."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.tune.search import Searcher

from cluster.resources import described, fits
from tune_sparse.ray_callback import Stop

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the cluster's resources."""


class Dispatcher(Searcher):
    """Hands out trials from lanes, one for each kind of hardware, each in its own order.

    Tune gets no trial that would have to wait for room, so none stands in the way of another: a full lane never
    holds up the next. Nor does Tune hold, or copy, more than what runs.

    lanes: the scarcest hardware first. trial_of: the trial of an item, which has `resources`, asked for when it is its
    turn. total: resources of the whole cluster. limit: trials at once. stop: ends it.
    """

    def __init__(
        self,
        lanes: Mapping[str, Iterable[Any]],
        trial_of: Callable[[Any], dict[str, Any]],
        total: Callable[[], Mapping[str, float]],
        limit: int | None = None,
        stop: Stop | None = None,
    ) -> None:
        super().__init__()
        self._lanes = {name: deque(items) for name, items in lanes.items()}
        self._trial_of, self._total, self._limit, self._stop = trial_of, total, limit, stop or Stop()
        self._held: dict[str, Mapping[str, float]] = {}
        self._seen: Mapping[str, float] = {}
        self._looked, self._said = float("-inf"), False

    def suggest(self, trial_id: str) -> Any:
        if self._stop.reason or not (self._held or any(self._lanes.values())):
            return Searcher.FINISHED
        if len(self._held) == self._limit:
            return None
        free = self._free()
        heads = [(lane, self._trial_of(lane[0])) for lane in self._lanes.values() if lane]
        for lane, trial in heads:
            if fits(trial["resources"], free):
                lane.popleft()
                self._held[trial_id] = trial["resources"]
                return {"trial": trial}
        if heads and not self._held and not self._said:
            self._said = True
            logger.warning("waiting for a node with %s", " or ".join(described(t["resources"]) for _, t in heads))
        return None

    def again(self, lane: str, item: Any) -> None:
        """Hand `item` out once more, after the others of its lane."""
        self._lanes[lane].append(item)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._held.pop(trial_id, None)

    def _free(self) -> dict[str, float]:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._seen, self._looked = dict(self._total()), time.monotonic()
        free = dict(self._seen)
        for held in self._held.values():
            for name, amount in held.items():
                free[name] = free.get(name, 0) - amount
        return free

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger knows what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""
