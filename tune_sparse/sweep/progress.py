"""How a sweep is doing: one live screen on a terminal, plain lines in a job log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from tune_sparse.ledger.record import Record

LINE_SECONDS = 15.0
"""Between two plain lines, unless a run fails."""


class Progress:
    """Counts runs as they end and says so.

    describe: where not all of `total` may run, says what is known of the curve of a run, or of all with None.
    """

    def __init__(self, total: int, done_before: int, describe: Callable[[str | None], str] | None = None) -> None:
        self.total, self.ended_count, self.failed, self.stopped = total, done_before, 0, 0
        self._describe = describe
        self._ended_here = 0
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._started = self._last_line = time.monotonic()
        self._bars: Bars | None = None
        self._running: dict[str, TaskID] = {}

    @contextmanager
    def shown(self, workers: int) -> Iterator[None]:
        """Show progress while the block runs."""
        self._started = time.monotonic()
        if not self._console.is_terminal:
            left = f"{'at most ' if self._describe else ''}{self.total - self.ended_count}"
            self._say(f"running {left} of {self.total} trainings on {workers} workers")
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self._console, transient=True) as self._bars:
            self._all = self._bars.add_task("trainings", total=self.total, completed=self.ended_count, note="")
            self._running = {}
            yield
        self._bars = None

    def started(self, run_id: str, label: str) -> None:
        """A run began; `label` names it on the screen."""
        if self._bars is not None:
            if run_id in self._running:
                self._bars.remove_task(self._running[run_id])
            note = self._describe(run_id) if self._describe else ""
            self._running[run_id] = self._bars.add_task(label, total=None, note=note)

    def reported(self, run_id: str, step: int, steps: int) -> None:
        """A run is at `step` of `steps`."""
        if self._bars is not None and run_id in self._running:
            self._bars.update(self._running[run_id], completed=step, total=steps)

    def ended(self, record: Record) -> None:
        """A run has a record."""
        self.ended_count += 1
        self._ended_here += 1
        self.stopped += record.status == "stopped"
        if record.status == "failed":
            self.failed += 1
            assert record.error is not None
            self._say(f"failed: {record.run_id}: {record.error['class']}: {record.error['message']}")
        if self._bars is not None:
            if record.run_id in self._running:
                self._bars.remove_task(self._running.pop(record.run_id))
            self._bars.update(self._all, completed=self.ended_count, note=self._note())
        elif time.monotonic() - self._last_line >= LINE_SECONDS or self.ended_count == self.total:
            self._say(f"{self.ended_count}{self._of}{self.total} trainings, {self._note()}")

    def say(self, *lines: str) -> None:
        """Print lines, above the bars where there are any."""
        for line in lines:
            self._say(line)

    def requeued(self, record: Record) -> None:
        """A run that ended in an infrastructure error will run once more."""
        assert record.error is not None
        self._say(f"to be tried again: {record.run_id}: {record.error['class']}: {record.error['message']}")
        if self._bars is not None and record.run_id in self._running:
            self._bars.remove_task(self._running.pop(record.run_id))

    @property
    def _of(self) -> str:
        return " of at most " if self._describe else "/"

    def _note(self) -> str:
        if self._describe:
            return f"{self.failed} failed, {self._describe(None)}"
        rate = (time.monotonic() - self._started) / self._ended_here
        left = rate * (self.total - self.ended_count)
        stopped = f"{self.stopped} stopped early, " if self.stopped else ""
        return f"{self.failed} failed, {stopped}about {duration(left)} left"

    def _say(self, line: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(line, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3.4 h, 2.1 days."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"
