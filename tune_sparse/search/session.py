"""A search that runs: its plan, its ledger and journal, and the trainings that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_sparse.errors import RunError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.search.journal import SearchJournal
from tune_sparse.search.plan import SearchPlan
from tune_sparse.sweep.ray_session import capacity, nodes, run_trials, stop_on_signals
from tune_sparse.sweep.resources import Placement, trial_settings


@dataclass(frozen=True)
class SearchSession:
    """Everything that the stages of a running search share."""

    plan: SearchPlan
    ledger: Ledger
    journal: SearchJournal
    token: str
    """of the lease of the results folder"""
    workers: int
    """trials at once"""
    report: Callable[[str], None]

    @property
    def folder(self) -> Path:
        return self.journal.folder

    def settings(self, run: Run) -> dict[str, Any]:
        """The settings that every trial of a run in this search is given."""
        sweep = self.plan.config.sweep
        return trial_settings(run, sweep, self.ledger.folder, Placement(sweep, nodes))


def train(run: Run, session: SearchSession) -> str | None:
    """Train what is not in the ledger yet; returns why it was stopped, if it was."""
    if session.ledger.is_done(run.run_id):
        return None
    from ray import tune

    from trainables.cell import CellTrainable
    from tune_sparse.sweep.scheduler import ResourceQueue
    from tune_sparse.sweep.sources import Listed
    from tune_sparse.sweep.tune_parts import Stop

    stop = Stop()
    session.report(f"training {run.run_id}")
    trial = session.settings(run) | {"token": session.token}
    with stop_on_signals(stop):
        queue = ResourceQueue({"training": Listed([trial])}, dict, capacity, stop=stop)
        run_trials(CellTrainable, queue, tune.Callback(), stop)
    record = session.ledger.record(run.run_id)
    if record is not None and record.status == "done":
        return None
    if stop.reason:
        return stop.reason
    error = record.error if record else None
    why = f"{error['class']}: {error['message']}" if error else "its worker ended unexpectedly"
    raise RunError(f"a search needs its trainings, {run.run_id} failed ({why}). Fix the cause and start it again.")
