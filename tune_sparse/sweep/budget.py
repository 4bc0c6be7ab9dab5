"""A budget of runs or hours: what a sweep has spent of it, and whether it is enough for one more run."""

from __future__ import annotations

from tune_sparse.config.spending import BudgetLimit
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.forecast import TIME_GROUPS, Medians, RunCost, cost_of_run
from tune_sparse.sweep.plan import Plan

SECONDS = {"cpu-hours": "cpu_seconds", "gpu-hours": "gpu_seconds", "cs3-hours": "cs3_seconds"}
"""{unit of a budget: what it is of a `RunCost`}"""
ROUNDING = 1e-9


class Budget:
    """Counts what every ended run of a matrix has cost, whoever ran it, and what the running ones are expected to.

    A run is expected to cost what a forecast says. Of runs like which none was measured, one at a time begins: it tells
    the price of the others. A run that failed counts as one, and for the hours that it was expected to take; one that
    was stopped early as one, and for its share of them.
    """

    def __init__(self, limit: BudgetLimit, plan: Plan, ledger: LedgerReader) -> None:
        self.limit, self._plan, self._ledger = limit, plan, ledger
        self._measured: list[tuple[Run, RunCost]] = []
        self._medians: Medians | None = None
        self._ended, self._running = dict[str, float](), dict[str, float | None]()
        self.stopped_before: Run | None = None
        """The run that would have exceeded it."""
        records = [record for run_id in plan.runs if (record := ledger.record(run_id))]
        for record in sorted(records, key=lambda record: record.status):  # done before failed
            self.ended(record)

    @property
    def spent(self) -> float:
        return sum(self._ended.values())

    @property
    def left(self) -> float:
        return max(0.0, self.limit.amount - self.spent)

    def expected(self, run: Run) -> float | None:
        """In the unit of the limit; None where nothing like it was measured."""
        if self.limit.unit == "runs":
            return 1.0
        if self._medians is None:
            self._medians = Medians(self._measured, TIME_GROUPS)
        _, median = self._medians.nearest(run)
        return None if median is None else self._amount(median)

    def allows(self, run: Run) -> bool:
        cost, running = self.expected(run), self._running.values()
        left = self.limit.amount - self.spent - sum(filter(None, running)) + ROUNDING
        fits = left > ROUNDING and None not in running if cost is None else cost <= left
        self.stopped_before = None if fits or None in running else run
        return fits

    def started(self, run: Run) -> None:
        self._running[run.run_id] = self.expected(run)

    def stopped(self, run_id: str) -> None:
        """It ended without a result, and may begin again."""
        self._running.pop(run_id, None)

    def ended(self, record: Record) -> None:
        self.stopped(record.run_id)
        run = self._plan.runs[record.run_id]
        if record.status == "failed" or record.stopped:
            self._ended[run.run_id] = (self.expected(run) or 0.0) * self._share(record)
        elif record.status == "done" and self.limit.unit == "runs":
            self._ended[run.run_id] = 1.0
        elif record.status == "done":
            cost = cost_of_run(run, record, self._ledger.run_folder(run.run_id), self._plan.config)
            self._measured.append((run, cost))
            self._medians = None
            self._ended[run.run_id] = self._amount(cost)

    def _share(self, record: Record) -> float:
        """Of what a whole run is expected to take: of hours, that of the steps before one was stopped early."""
        if record.stopped is None or self.limit.unit == "runs":
            return 1.0
        return float(record.stopped["step"] / record.stopped["steps"])

    def _amount(self, cost: RunCost) -> float:
        seconds: float = getattr(cost, SECONDS[self.limit.unit])
        return seconds / 3600
