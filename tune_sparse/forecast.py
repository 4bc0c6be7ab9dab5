"""What the missing runs of a plan will take, from those that were measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tune_sparse.plan import Plan
from tune_sparse.result import Ledger, Run


@dataclass(frozen=True)
class Forecast:
    """What the missing runs will take, from measured runs of the same model and task."""

    seconds: float | None
    """Device-seconds, or None while some model and task have no measured run."""
    disk_bytes: int
    unmeasured: int
    """Runs without a measured one to go by."""


def forecast(plan: Plan, ledger: Ledger, missing: Sequence[Run]) -> Forecast:
    """Device-seconds as the median of done runs of the same model, task and protocol in this folder."""
    measured: dict[tuple[str, str], list[float]] = {}
    for run in plan.runs.values():
        record = ledger.record(run.run_id)
        if record and record.status == "done":
            measured.setdefault((run.cell.model, run.cell.task), []).append(record.measured["trial_seconds"])
    known = [
        statistics.median(measured[key]) for run in missing if (key := (run.cell.model, run.cell.task)) in measured
    ]
    unmeasured = len(missing) - len(known)
    return Forecast(None if unmeasured else sum(known), sum(plan.bytes_of(run) for run in missing), unmeasured)
