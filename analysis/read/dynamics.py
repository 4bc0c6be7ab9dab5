"""What became of masks while runs trained: their records, and the table of how each run ended."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.dynamics import read_dynamics
from tune_sparse.ledger.run import Run
from tune_sparse.schedules import ONE_SHOT, SCHEDULES

IMPOSSIBLE = "impossible by schedule"
Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunDynamics:
    """The records of one run that is done."""

    run: Run
    lines: Sequence[Line]
    eval_losses: Sequence[tuple[int, float]]
    """(step, loss on the selection examples)"""
    schedule: str
    """its name in tables"""

    @property
    def may_revive(self) -> bool:
        """Whether its schedule lets pruned weights come back."""
        schedule = SCHEDULES[self.run.cell.schedule]
        return bool(schedule.grows) or ("revivable" in schedule.settings and self.run.schedule_settings.revivable)

    @property
    def updates(self) -> list[Line]:
        """The records of the steps after which its masks changed."""
        return [line for line in self.lines if line["is_update"]]


def dynamics_by_run(ledger: LedgerReader, run_ids: Iterable[str]) -> dict[str, RunDynamics]:
    """{run_id: its records} of those runs that have any."""
    found = {}
    for run_id in dict.fromkeys(run_ids):
        folder = ledger.run_folder(run_id)
        if lines := read_dynamics(folder):
            run = ledger.run(run_id)
            found[run_id] = RunDynamics(run, lines, _eval_losses(folder), run.cell.schedule)
    return found


def _eval_losses(folder: Path) -> list[tuple[int, float]]:
    path = folder / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


TABLE = ("model", "task", "method", "schedule", "mode", "sparsity", "seed", "run_id")
"""What names a row of the table of dynamics."""


def dynamics_table(cells: pd.DataFrame, dynamics: Mapping[str, RunDynamics]) -> pd.DataFrame:
    """One row a cell that is done and has records: how its masks ended."""
    done = cells[cells["status"] == "done"].drop_duplicates("run_id")
    rows = [_row(cell, dynamics[cell["run_id"]]) for cell in done.to_dict("records") if cell["run_id"] in dynamics]
    return pd.DataFrame(rows)


def named_schedule(cell: Mapping[Any, Any], found: RunDynamics) -> str:
    """As the table calls it; cells without zeros of every schedule share a run whose masks stay."""
    return ONE_SHOT if found.run.cell.schedule == ONE_SHOT else str(cell["schedule"])


def _row(cell: Mapping[Any, Any], found: RunDynamics) -> dict[str, Any]:
    last = found.lines[-1]
    return {name: cell[name] for name in TABLE} | {
        "schedule": named_schedule(cell, found),
        "counted_sparsity": last["sparsity/overall"],
        "metric": cell["primary_metric"],
        "score": cell["accuracy"] if pd.notna(cell["accuracy"]) else cell["perplexity"],
        "updates": len(found.updates),
        "revival": "possible" if found.may_revive else IMPOSSIBLE,
        "revived": last["weight_revival/total"],
        "never_revived_share": last["weight_revival/never_revived_share"],
        "mean_steps_at_zero": last["zero_duration/mean"],
        "dead_outputs": last["dead_neurons/average.out"],
        "dead_inputs": last["dead_neurons/average.in"],
        "health": last["health"],
        "effective_rank": last.get("effective_rank/average"),
        "sparsity_slope": last["trends/sparsity_slope"],
    }
