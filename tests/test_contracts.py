"""Who may do what with a ledger: mypy checks that a call site takes no more than it needs, this checks the classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainables.remote_ledger import RemoteLedger
from tune_sparse.ledger.contracts import LedgerReader, RunStore
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.reader import MergedLedger

WRITING = {
    "writing",
    "write_record",
    "write_sweep",
    "write_pruned_baseline",
    "set_aside",
    "remove_partial",
    "checkpoint",
}
READING = {"record", "run", "run_ids", "is_done", "sweeps", "searches", "run_folder"}


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_a_merged_ledger_only_reads() -> None:
    assert public(MergedLedger) == public(LedgerReader)
    assert public(MergedLedger) & WRITING == set()


def test_a_remote_ledger_only_stores() -> None:
    assert public(RemoteLedger) == public(RunStore)
    assert public(RemoteLedger) & READING == set()


def test_a_results_folder_does_both(tmp_path: Path) -> None:
    assert public(Ledger(tmp_path)) >= public(LedgerReader) | public(RunStore) | WRITING | READING


def test_a_merged_ledger_has_no_folder_of_its_own_to_write_to(tmp_path: Path) -> None:
    merged = MergedLedger([tmp_path / "a", tmp_path / "b"])
    assert merged.folders == (tmp_path / "a", tmp_path / "b")
    with pytest.raises(AttributeError):
        merged.folder  # type: ignore[attr-defined]  # noqa: B018
