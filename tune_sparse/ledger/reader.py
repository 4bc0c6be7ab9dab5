"""Results folders of several sites, read as one ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tune_sparse.ledger.ledger import Ledger, SweepRecord

PREFERENCE = ("done", "failed", "interrupted", "missing")
"""A run that several folders have is taken from the one where it came furthest, the first of equals."""


class MergedLedger(Ledger):
    """Only to be read: each run lies in one of the folders."""

    def __init__(self, folders: Sequence[Path]) -> None:
        super().__init__(folders[0])
        self._ledgers = [Ledger(folder) for folder in folders]

    def run_folder(self, run_id: str) -> Path:
        """In the folder where the run came furthest."""
        found = self._ledgers[0]
        if len(self._ledgers) > 1:
            found = min(self._ledgers, key=lambda ledger: PREFERENCE.index(_status(ledger, run_id)))
        return found.run_folder(run_id)

    def sweeps(self) -> list[SweepRecord]:
        """A sweep that several folders have, once: as it was started first."""
        found: dict[str, SweepRecord] = {}
        for sweep in sorted((s for ledger in self._ledgers for s in ledger.sweeps()), key=lambda sweep: sweep.started):
            found.setdefault(sweep.sweep_id, sweep)
        return list(found.values())

    def searches(self) -> list[Path]:
        return [folder for ledger in self._ledgers for folder in ledger.searches()]


def _status(ledger: Ledger, run_id: str) -> str:
    record = ledger.record(run_id)
    return record.status if record else "missing"
