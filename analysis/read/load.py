"""Every cell that was requested, with what its run recorded: one row a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from analysis.read.results import READING_ERRORS
from tune_sparse.config import FLOPS_TOKENS
from tune_sparse.config.protocol import CALIBRATION_SETTINGS, UNCOMPARED_SETTINGS
from tune_sparse.data.task_types import METRICS
from tune_sparse.errors import unknown_name
from tune_sparse.evaluation.metrics import SUFFIXES, judged_again
from tune_sparse.identity import hash_json
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.curves import KnownCurve, known_curves
from tune_sparse.ledger.reader import MergedLedger
from tune_sparse.ledger.record import Record, SweepRecord

SCORES = tuple(f"{name}{suffix}" for name in ("accuracy", *METRICS) for suffix in SUFFIXES)
"""Each metric with its standard error, and before tuning and the merge; the first four are of the primary metric."""
COLUMNS = (
    "cell_id",
    "run_id",
    "shared_with",
    "backend",
    "model",
    "task",
    "method",
    "sparsity",
    "actual_sparsity",
    "mode",
    "seed",
    "protocol_id",
    "status",
    "primary_metric",
    *SCORES[:4],
    "chance_accuracy",
    "n_examples",
    "majority_fraction",
    "most_frequent_fraction",
    "truncated_fraction",
    "cut_fraction",
    *SCORES[4:],
    "f1",
    "f1_stderr",
    "train_loss",
    "eval_loss",
    "eval_loss_before_mask",
    "train_examples_per_second",
    "train_tokens_per_second",
    "train_seconds",
    "peak_memory_bytes",
    "cell_peak_memory_bytes",
    "compile_seconds",
    "calibration_tokens_seen",
    "inference_flops",
    "hardware",
    "calibration",
    "calibration_order",
    "error",
    "comparable",
)
NUMBERS = ["sparsity", "actual_sparsity", *COLUMNS[COLUMNS.index("accuracy") : COLUMNS.index("hardware")]]


def cells_table(
    results_dirs: Sequence[Path],
    sweep_ids: Sequence[str] | None = None,
    primary_metrics: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """Return the columns of `COLUMNS`, one row a cell of every sweep in the folders, or of those named.

    protocol_id names every setting of the protocol that changes numbers, but for calibration and recovery, which a
    dense baseline does not have. A cell without a done run has a status (failed, interrupted, missing), a reason, and
    no numbers. A cell that several folders have is taken from the one where its run came furthest. `comparable` is
    false of a cell that was run because of other results (`chosen_cells`). `primary_metrics`, {task: metric}, chooses
    again what `accuracy` is by; a task that it does not name keeps its own.
    Raises `InputError` for an unknown sweep.
    """
    ledger = MergedLedger(results_dirs)
    cells = _requested_cells(ledger, sweep_ids)
    records = {run_id: ledger.record(run_id) for run_id in dict.fromkeys(cell["run_id"] for cell in cells)}
    protocols = {run: _protocol_id(ledger, run) for run, r in records.items() if r and r.status == "done"}
    rows = [
        _row(cell, records[cell["run_id"]], primary_metrics) | {"protocol_id": protocols.get(cell["run_id"])}
        for cell in cells
    ]
    owners, chosen = dict[str, str](), chosen_cells(ledger)
    for row in rows:
        row["comparable"] = row["cell_id"] not in chosen
        owner = owners.setdefault(row["run_id"], row["cell_id"])
        row["shared_with"] = None if owner == row["cell_id"] else owner
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype(dict.fromkeys(NUMBERS, float)).copy()  # pandas warns of a table in many pieces


def _requested_cells(ledger: LedgerReader, sweep_ids: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return each cell of all sweeps, or of those named, as the oldest of them requested it."""
    sweeps = {sweep.sweep_id: sweep for sweep in ledger.sweeps()}
    for sweep_id in sweep_ids or ():
        if sweep_id not in sweeps:
            raise unknown_name("sweep", sweep_id, sweeps)
    cells: dict[str, dict[str, Any]] = {}
    for sweep in sweeps.values():
        for cell in sweep.cells if sweep_ids is None or sweep.sweep_id in sweep_ids else ():
            cells.setdefault(cell["cell_id"], cell)
    return list(cells.values())


def chosen_cells(ledger: LedgerReader) -> set[str]:
    """Find the cells that a sweep with find or budget ran, or left, because of other results: at no sparsity that was
    fixed before its start. Once every run of a sweep has ended, nothing in it is chosen any more."""
    chosen, fixed, sweeps = set[str](), set[str](), ledger.sweeps()
    for sweep in sweeps if any(sweep.chosen_by for sweep in sweeps) else ():
        if _is_whole(ledger, sweep):
            fixed |= {cell["cell_id"] for cell in sweep.cells}
        elif sweep.chosen_by:
            levels = {0.0, *sweep.chosen_by["compare_at"]}
            chosen |= {cell["cell_id"] for cell in sweep.cells}
            fixed |= {cell["cell_id"] for cell in sweep.cells if cell["sparsity"] in levels}
    return chosen - fixed


def found_curves(ledger: LedgerReader, sweep_ids: Sequence[str] | None = None) -> list[KnownCurve]:
    """The curves of sweeps that find, while runs of theirs are left; of all sweeps, or of those named."""
    chosen = [sweep for sweep in ledger.sweeps() if sweep_ids is None or sweep.sweep_id in sweep_ids]
    return [curve for sweep in chosen if not _is_whole(ledger, sweep) for curve in known_curves(sweep, ledger.record)]


def _is_whole(ledger: LedgerReader, sweep: SweepRecord) -> bool:
    records = (ledger.record(run_id) for run_id in sweep.run_ids)
    return all(record is not None and record.status != "interrupted" for record in records)


def _protocol_id(ledger: LedgerReader, run_id: str) -> str | None:
    """A short hash of a run's protocol; None where its config cannot be read, which the audit lists."""
    try:
        settings = asdict(ledger.run(run_id).protocol)
    except READING_ERRORS:
        return None
    left_out = (*CALIBRATION_SETTINGS, "recover", *UNCOMPARED_SETTINGS)
    return hash_json({name: value for name, value in settings.items() if name not in left_out})[:8]


def _row(cell: dict[str, Any], record: Record | None, primary_metrics: Mapping[str, str]) -> dict[str, Any]:
    row = {name: cell[name] for name in COLUMNS if name in cell}
    row |= {"chance_accuracy": cell["chance"], "status": record.status if record else "missing"}
    if record is None:
        return row | {"error": "not run yet"}
    if record.status == "interrupted":
        row["error"] = "interrupted; the same sweep runs it again"
    if record.error:
        row["error"] = f"{record.error['class']}: {record.error['message']}"
    if record.status == "done":
        metrics = judged_again(record.metrics, cell["task"], primary_metrics)
        found = metrics | record.measured | record.environment
        found |= {"inference_flops": record.metrics.get("inference_flops", {}).get(str(FLOPS_TOKENS))}
        row |= {name: found[name] for name in COLUMNS if name in found}
    return row
