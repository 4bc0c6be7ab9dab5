"""Every cell that was requested, with what its run recorded: one row a cell."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from analysis.read.results import READING_ERRORS
from analysis.read.seeds import AXIS
from tune_sparse.config import FLOPS_TOKENS
from tune_sparse.config.axes import PAIRED, settings_of
from tune_sparse.config.options import value_text
from tune_sparse.config.protocol import CALIBRATION_SETTINGS, UNCOMPARED_SETTINGS
from tune_sparse.data.task_types import METRICS
from tune_sparse.errors import unknown_name
from tune_sparse.evaluation.metrics import SUFFIXES, judged_again
from tune_sparse.identity import hash_json
from tune_sparse.ledger.choice import Choice, RequestedCell, axes_key, choices, requested_cells, schedule_names
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.curves import KnownCurve, known_curves
from tune_sparse.ledger.reader import MergedLedger
from tune_sparse.ledger.record import Record, SweepRecord, has_ended

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
    "schedule",
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
    "bits_per_byte",
    "train_loss",
    "eval_loss",
    "eval_loss_before_mask",
    "train_examples_per_second",
    "train_tokens_per_second",
    "train_seconds",
    "trial_seconds",
    "peak_memory_bytes",
    "cell_peak_memory_bytes",
    "compile_seconds",
    "calibration_tokens_seen",
    "inference_flops",
    "hardware",
    "calibration",
    "calibration_order",
    "error",
    "candidates",
    "chosen",
    "choice",
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
    dense baseline does not have. A cell without a done run has a status (failed, stopped, interrupted, missing), a
    reason, and no numbers. A cell that several folders have is taken from the one where its run came furthest.
    `schedule` has the settings that tell two schedules of one name apart, if these cells have two.
    `comparable` is false of a cell that was run because of other results (`chosen_cells`).
    `primary_metrics`, {task: metric}, chooses again what `accuracy` is by; a task that it does not name keeps its own.

    Where sweeps had axes, every setting of a cell has its row, with the values in columns `axis/NAME`. candidates: the
    settings that the sweep had, whose names protocol_id leaves out and has these instead. chosen: the one that counts,
    which is all that `analysis.read.chosen.compared_cells` leaves. choice: why none does.
    Raises `InputError` for an unknown sweep.
    """
    ledger = MergedLedger(results_dirs)
    cells = _of_longest_chains(requested_cells(_named_sweeps(ledger, sweep_ids)))
    records = {run_id: ledger.record(run_id) for run_id in dict.fromkeys(cell.run_id for cell in cells)}
    found = choices(cells, records.get)
    protocols = {key: _protocol_id(ledger, *key) for key in _done_protocols(cells, records)}
    names = schedule_names(cells)
    rows = [
        _row(cell.row, records[cell.run_id], primary_metrics)
        | {"schedule": names[cell.schedule, cell.schedule_settings]}
        | _choice_columns(cell, found[cell.candidates_key])
        | {"protocol_id": protocols.get((cell.run_id, axes_key(cell.axes)))}
        for cell in cells
    ]
    owners, chosen = dict[str, str](), chosen_cells(ledger)
    for row in rows:
        row["comparable"] = row["cell_id"] not in chosen
        owner = owners.setdefault(row["run_id"], row["cell_id"])
        row["shared_with"] = None if owner == row["cell_id"] else owner
    axes = dict.fromkeys(name for row in rows for name in row if name.startswith(AXIS))
    table = pd.DataFrame(rows, columns=[*COLUMNS, *axes])
    return table.astype(dict.fromkeys(NUMBERS, float) | {"chosen": bool}).copy()  # pandas warns of many pieces


def _named_sweeps(ledger: LedgerReader, sweep_ids: Sequence[str] | None) -> list[SweepRecord]:
    """All sweeps, or those of these names."""
    sweeps = {sweep.sweep_id: sweep for sweep in ledger.sweeps()}
    for sweep_id in sweep_ids or ():
        if sweep_id not in sweeps:
            raise unknown_name("sweep", sweep_id, sweeps)
    return [sweep for name, sweep in sweeps.items() if sweep_ids is None or name in sweep_ids]


def _of_longest_chains(cells: Sequence[RequestedCell]) -> list[RequestedCell]:
    """Leave out levels on the way that have the sparsity of a cell that was asked for, or of a level on a longer way:
    chains of different length have different steps at one sparsity, and a table shows one of them."""

    def place(cell: RequestedCell) -> tuple[Any, ...]:
        return *cell.candidates_key, cell.row.get("seed"), json.dumps(cell.setting)

    def length(cell: RequestedCell) -> float:
        return float(cell.row.get("chain_to", math.inf))

    longest: dict[tuple[Any, ...], float] = {}
    for cell in cells:
        longest[place(cell)] = max(longest.get(place(cell), 0.0), length(cell))
    return [cell for cell in cells if length(cell) == longest[place(cell)]]


def _choice_columns(cell: RequestedCell, choice: Choice) -> dict[str, Any]:
    is_chosen = choice.chosen == cell.setting
    texts = [PAIRED.join(map(value_text, setting.values())) for setting, _ in choice.losses]
    columns = {"candidates": ", ".join(texts), "chosen": is_chosen, "choice": choice.why_not}
    return columns | {f"{AXIS}{name}": value for name, value in cell.setting.items()}


def _done_protocols(cells: Sequence[RequestedCell], records: Mapping[str, Record | None]) -> Iterator[tuple[str, str]]:
    """(run that is done, key of the axes with which it was requested)"""
    for cell in cells:
        record = records[cell.run_id]
        if record and record.status == "done":
            yield cell.run_id, axes_key(cell.axes)


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
    return all(has_ended(ledger.record(run_id)) for run_id in sweep.run_ids)


def _protocol_id(ledger: LedgerReader, run_id: str, axes: str) -> str | None:
    """A short hash of a run's protocol, with the values of axes in place of those that the run has; None where its
    config cannot be read, which the audit lists."""
    try:
        settings = asdict(ledger.run(run_id).protocol)
    except READING_ERRORS:
        return None
    names = {name for axis in json.loads(axes or "{}") for name in settings_of(axis)}
    left_out = {*CALIBRATION_SETTINGS, "recover", *UNCOMPARED_SETTINGS, *names}
    compared = {name: value for name, value in settings.items() if name not in left_out}
    return hash_json(compared | ({"axes": axes} if axes else {}))[:8]


def _row(cell: Mapping[str, Any], record: Record | None, primary_metrics: Mapping[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {name: cell[name] for name in COLUMNS if name in cell}
    row |= {"chance_accuracy": cell["chance"], "status": record.status if record else "missing"}
    if record is None:
        return row | {"error": "not run yet"}
    if record.status == "interrupted":
        row["error"] = "interrupted; the same sweep runs it again"
    if record.stopped:
        row["error"] = record.stopped_at
    if record.error:
        row["error"] = f"{record.error['class']}: {record.error['message']}"
    if record.status == "done":
        metrics = judged_again(record.metrics, cell["task"], primary_metrics)
        found = metrics | record.measured | record.environment
        found |= {"inference_flops": record.metrics.get("inference_flops", {}).get(str(FLOPS_TOKENS))}
        row |= {name: found[name] for name in COLUMNS if name in found}
    return row
