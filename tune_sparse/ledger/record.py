"""The records of a ledger: how a run ended, and what a sweep requested."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tune_sparse.files import read_json

Status = Literal["done", "failed", "stopped", "interrupted"]


@dataclass(frozen=True)
class Record:
    """The end of a run. `metrics` repeat bit for bit on a CPU; `measured` are seconds, rates and memory."""

    run_id: str
    identity: str
    status: Status
    metrics: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    """class, message, traceback, retryable; of one that lacked memory also device_memory_bytes, version and budgets"""
    stopped: dict[str, Any] | None = None
    """of one that was stopped early: step, steps, by, and values, {step of a rung: loss or accuracy there}"""

    @property
    def stopped_at(self) -> str:
        """Where a training was stopped early, for people."""
        assert self.stopped is not None
        return (
            f"stopped early at step {self.stopped['step']} of {self.stopped['steps']}, judged by {self.stopped['by']}"
        )


def has_ended(record: Record | None) -> bool:
    """Whether a run has its result, or will have none: it failed, or was stopped early."""
    return record is not None and record.status != "interrupted"


@dataclass(frozen=True)
class SweepRecord:
    """The cells that a sweep requested, each with the id of the run that serves it."""

    sweep_id: str
    started: float
    config: dict[str, Any]
    cells: tuple[dict[str, Any], ...]
    """the fields of a `Cell`, with cell_id, run_id, pruning_id (None where the run's method stores none), shared_with
    (the cell_id that owns the run, or None), chance; of a level on the way to a cell also chain_to, that cell's
    sparsity"""
    chosen_by: dict[str, Any] | None = None
    """find, find_levels, budget and compare_at of the last start that did not ask for every run; None if all did"""

    @property
    def run_ids(self) -> list[str]:
        return list(dict.fromkeys(cell["run_id"] for cell in self.cells))


def read_record(folder: Path) -> Record | None:
    """Read how the run of a folder ended; None if no readable record says so."""
    try:
        return Record(**read_json(folder / "result.json"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, TypeError, UnicodeDecodeError):
        return None


def is_done(folder: Path) -> bool:
    """Say whether a record has the run of a folder as done."""
    record = read_record(folder)
    return record is not None and record.status == "done"


def readable_sweeps(folder: Path) -> Iterator[SweepRecord]:
    """Read every sweep record of a folder that can be read."""
    for path in folder.glob("*.json"):
        with suppress(json.JSONDecodeError, TypeError, UnicodeDecodeError):
            yield SweepRecord(**read_json(path))
