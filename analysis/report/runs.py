"""Finds the folders of runs, and reads the files that figures and pages need besides the records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.read.dynamics import RunDynamics, dynamics_by_run
from analysis.read.results import Predictions, is_measured_elsewhere
from analysis.stats.comparisons import difference_between_runs
from analysis.stats.statistics import Estimate
from tune_sparse.files import read_json
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.reader import MergedLedger
from tune_sparse.ledger.record import Record


@dataclass(frozen=True)
class Runs:
    """The runs of several results folders, each found in the folder where it came furthest."""

    ledger: LedgerReader
    predictions: Mapping[str, Predictions] = field(default_factory=dict)
    """{run_id: what its model answered}"""
    _dynamics: dict[str, RunDynamics] = field(default_factory=dict)
    """as they were read: several figures and a table need them"""

    def find_run_folder(self, run_id: str) -> Path | None:
        """The folder of a run, if any results folder has one."""
        folder = self.ledger.run_folder(run_id)
        return folder if folder.is_dir() else None

    def record(self, run_id: str) -> Record | None:
        return self.ledger.record(run_id)

    def kept_by_matrix(self, run_id: str) -> dict[str, tuple[int, int]]:
        """{tensor: (kept weights, weights)}; empty where nothing was pruned."""
        folder = self.find_run_folder(run_id)
        path = folder / "sparse_config.json" if folder else None
        kept = read_json(path).get("kept_by_matrix") if path and path.is_file() else None
        return {name: (int(left), int(size)) for name, (left, size) in (kept or {}).items()}

    def dynamics(self, run_ids: Iterable[str]) -> dict[str, RunDynamics]:
        """{run_id: what became of its masks} of those runs that recorded it."""
        run_ids = list(run_ids)
        self._dynamics.update(dynamics_by_run(self.ledger, (name for name in run_ids if name not in self._dynamics)))
        return {name: self._dynamics[name] for name in run_ids if name in self._dynamics}

    def difference(self, left: str, right: str) -> Estimate | None:
        """The accuracy of run `right` minus that of `left`, of what both answered; None if it was not the same."""
        a, b = self.predictions.get(left), self.predictions.get(right)
        if a is None or b is None or not np.array_equal(a.ids, b.ids):
            return None
        return difference_between_runs(self.predictions, left, right)

    def throughputs(self) -> Iterator[dict[str, Any]]:
        """Measurements of `tune-sparse throughput`, but for those that another backend made: run_id, by_batch_size."""
        for folder in self.ledger.folders:
            for path in sorted((folder / "throughput").glob("*.json")):
                value = read_json(path)
                if not is_measured_elsewhere(value):
                    yield value

    def searches(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """(what was requested, the front) of each finished sub-adapter search."""
        for folder in self.ledger.searches():
            if (folder / "result.json").exists():
                yield read_json(folder / "config.json"), read_json(folder / "result.json")["front"]


def relative_link(path: Path, page: Path) -> str:
    """The address of `path` in a page, so that both may move together."""
    return Path(os.path.relpath(path.resolve(), page.parent.resolve())).as_posix()


def find_runs(folders: Sequence[Path], predictions: Mapping[str, Predictions] | None = None) -> Runs:
    return Runs(MergedLedger(folders), predictions or {})
