"""Where a queue takes its next trial from: a list, or the runs that `--find` wants; within a budget or without."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from tune_sparse.ledger.run import Run
from tune_sparse.sweep.budget import Budget
from tune_sparse.sweep.find import Finder


class Source(Protocol):
    """Items one after the other; which is next may depend on what has ended."""

    def peek(self) -> Any:
        """The item that is next; None where there is none, at least until another one has ended."""

    def take(self) -> None:
        """The item that `peek` gave begins."""

    def put_back(self, item: Any) -> None:
        """An item that began is given once more, after the others."""


class Listed:
    """Items in their order.

    ready: whether an item may have its turn; until then those behind it go first, and one that never may is never
    given.
    """

    def __init__(self, items: Iterable[Any], ready: Callable[[Any], bool] = lambda item: True) -> None:
        self._items, self._ready = deque(items), ready

    def peek(self) -> Any:
        place = self._place()
        return None if place is None else self._items[place]

    def take(self) -> None:
        place = self._place()
        assert place is not None, "it gave an item"
        del self._items[place]

    def put_back(self, item: Any) -> None:
        self._items.append(item)

    def _place(self) -> int | None:
        return next((place for place, item in enumerate(self._items) if self._ready(item)), None)


class Found:
    """The runs that a finder wants, of those that wait for one kind of hardware.

    runs: those that may run, by their ids.
    """

    def __init__(self, finder: Finder, runs: Mapping[str, Run]) -> None:
        self._finder, self._runs = finder, runs

    def peek(self) -> Run | None:
        wanted = self._finder.next(self._runs.__contains__)
        return None if wanted is None else self._runs[wanted]

    def take(self) -> None:
        wanted = self._finder.next(self._runs.__contains__)
        assert wanted is not None, "it gave a run"
        self._finder.started(wanted)

    def put_back(self, run: Run) -> None:
        self._finder.stopped(run.run_id)


class Within:
    """The runs of another source, until the next of them would exceed a budget."""

    def __init__(self, source: Source, budget: Budget) -> None:
        self._source, self._budget = source, budget

    def peek(self) -> Run | None:
        run: Run | None = self._source.peek()
        return run if run and self._budget.allows(run) else None

    def take(self) -> None:
        self._budget.started(self._source.peek())
        self._source.take()

    def put_back(self, run: Run) -> None:
        self._budget.stopped(run.run_id)
        self._source.put_back(run)
