"""Results folders of several sites, read as one ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.prunings import StoredPruning
from tune_sparse.ledger.record import Record, SweepRecord
from tune_sparse.ledger.run import Run

PREFERENCE = ("done", "failed", "stopped", "interrupted", "missing")
"""A run that several folders have is taken from the one where it came furthest, the first of equals."""


class MergedLedger:
    """A `LedgerReader` of several folders. Each run lies in one of them, and nothing can be written."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._ledgers = [Ledger(folder) for folder in folders]

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(ledger.folder for ledger in self._ledgers)

    def run_ids(self) -> list[str]:
        return sorted({run_id for ledger in self._ledgers for run_id in ledger.run_ids()})

    def run_folder(self, run_id: str) -> Path:
        return self._find_ledger(run_id).run_folder(run_id)

    def record(self, run_id: str) -> Record | None:
        return self._find_ledger(run_id).record(run_id)

    def run(self, run_id: str) -> Run:
        return self._find_ledger(run_id).run(run_id)

    def pruning(self, run: Run) -> StoredPruning | None:
        return self._find_ledger(run.run_id).pruning(run)

    def is_done(self, run_id: str) -> bool:
        return self._find_ledger(run_id).is_done(run_id)

    def sweeps(self) -> list[SweepRecord]:
        """Every sweep, the oldest first. One that several folders have counts once, as it was started first."""
        found: dict[str, SweepRecord] = {}
        for sweep in sorted((s for ledger in self._ledgers for s in ledger.sweeps()), key=lambda sweep: sweep.started):
            found.setdefault(sweep.sweep_id, sweep)
        return list(found.values())

    def searches(self) -> list[Path]:
        return [folder for ledger in self._ledgers for folder in ledger.searches()]

    def _find_ledger(self, run_id: str) -> Ledger:
        """Return the ledger where a run came furthest."""
        if len(self._ledgers) == 1:
            return self._ledgers[0]
        return min(self._ledgers, key=lambda ledger: PREFERENCE.index(_status(ledger, run_id)))


def _status(ledger: Ledger, run_id: str) -> str:
    record = ledger.record(run_id)
    return record.status if record else "missing"
