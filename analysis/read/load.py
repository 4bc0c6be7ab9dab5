"""Every cell that was requested, with what its run recorded: one row a cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tune_sparse.config import FLOPS_TOKENS
from tune_sparse.errors import unknown_name
from tune_sparse.ledger.ledger import Ledger, Record
from tune_sparse.ledger.reader import PREFERENCE

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
    "status",
    "accuracy",
    "accuracy_stderr",
    "accuracy_before_tuning",
    "accuracy_before_merge",
    "chance_accuracy",
    "n_examples",
    "majority_fraction",
    "most_frequent_fraction",
    "truncated_fraction",
    "accuracy_norm",
    "accuracy_flexible",
    "f1",
    "perplexity",
    "perplexity_stderr",
    "perplexity_before_tuning",
    "perplexity_before_merge",
    "train_loss",
    "eval_loss",
    "train_samples_per_second",
    "train_tokens_per_second",
    "train_seconds",
    "peak_memory_bytes",
    "compile_seconds",
    "inference_flops",
    "hardware",
    "error",
)
NUMBERS = ["sparsity", "actual_sparsity", *COLUMNS[COLUMNS.index("accuracy") : COLUMNS.index("hardware")]]


def cells_table(results_dirs: Sequence[Path], sweep_ids: Sequence[str] | None = None) -> pd.DataFrame:
    """The columns of `COLUMNS`, one row a cell of every sweep in the folders, or of those named.

    A cell without a done run has a status (failed, interrupted, missing), a reason, and no numbers. A cell that
    several folders have is taken from the one where its run came furthest.
    Raises `InputError` for an unknown sweep.
    """
    rows: dict[str, dict[str, Any]] = {}
    known_sweeps = {sweep.sweep_id for folder in results_dirs for sweep in Ledger(folder).sweeps()}
    for sweep_id in sweep_ids or ():
        if sweep_id not in known_sweeps:
            raise unknown_name("sweep", sweep_id, known_sweeps)
    for folder in results_dirs:
        ledger = Ledger(folder)
        records: dict[str, Record | None] = {}
        for sweep in ledger.sweeps():
            for cell in sweep.cells if sweep_ids is None or sweep.sweep_id in sweep_ids else ():
                run_id = cell["run_id"]
                if run_id not in records:
                    records[run_id] = ledger.record(run_id)
                row = _row(cell, records[run_id])
                known = rows.get(cell["cell_id"])
                if known is None or PREFERENCE.index(row["status"]) < PREFERENCE.index(known["status"]):
                    rows[cell["cell_id"]] = row
    owners: dict[str, str] = {}
    for row in rows.values():
        owner = owners.setdefault(row["run_id"], row["cell_id"])
        row["shared_with"] = None if owner == row["cell_id"] else owner
    table = pd.DataFrame(list(rows.values()), columns=list(COLUMNS))
    return table.astype(dict.fromkeys(NUMBERS, float))


def _row(cell: dict[str, Any], record: Record | None) -> dict[str, Any]:
    row = {name: cell[name] for name in COLUMNS if name in cell}
    row |= {"chance_accuracy": cell["chance"], "status": record.status if record else "missing"}
    if record is None:
        return row | {"error": "not run yet"}
    if record.status == "interrupted":
        row["error"] = "interrupted; the same sweep runs it again"
    if record.error:
        row["error"] = f"{record.error['class']}: {record.error['message']}"
    if record.status == "done":
        found = record.metrics | record.measured | record.environment
        found |= {"inference_flops": record.metrics.get("inference_flops", {}).get(str(FLOPS_TOKENS))}
        row |= {name: found[name] for name in COLUMNS if name in found}
    return row
