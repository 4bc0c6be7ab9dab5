"""results: the accuracy of every finished cell."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.cli.command import (
    FAULT,
    OK,
    add_command,
    add_json,
    add_primary_metrics,
    add_results_dirs,
    add_sweep_filter,
    existing_folders,
)
from tune_sparse.cli.words import RUN_WORDS, metrics, paragraph, words
from tune_sparse.data.tasks import chosen_metrics
from tune_sparse.errors import unknown_name

if TYPE_CHECKING:
    import pandas as pd

    from analysis.audit.audit import Audit

FILTERS = ("model", "task", "method", "mode", "schedule")


def declare(commands: Any) -> None:
    results = add_command(
        commands,
        "results",
        _results,
        "print the accuracy of every finished cell (combination of model, task, method, sparsity and mode)",
        examples=("results", "results --task boolq --method wanda sparsegpt", "results --json"),
        ok="a cell is finished, and the audit found no error",
        fault="no cell is finished, or the audit found an error",
        notes=[
            words("cell", *RUN_WORDS, "audit", "results folder"),
            paragraph(
                "A line has the primary metric of its task before and after tuning, its spread, and its difference to "
                "the unpruned, tuned model; then the other metrics. Letters are warnings of the audit, explained below "
                "the table. Where sweeps had the same cells under different settings, each sweep has its own table."
            ),
            metrics(),
        ],
    )
    add_results_dirs(results)
    add_sweep_filter(results)
    add_primary_metrics(results)
    for name in FILTERS:
        results.add_argument(
            f"--{name}", nargs="+", metavar=name.upper(), help=f"print only cells of these {name}s (default: all)"
        )
    results.add_argument(
        "--all-settings",
        action="store_true",
        help="where a sweep had axes, print every setting of a cell (default: the one that is chosen on selection "
        "examples)",
    )
    add_json(results, "all columns of the table, and more")


def _results(chosen: argparse.Namespace) -> int:
    from analysis.report.result_table import as_json, result_lines

    only = {name: values for name in FILTERS if (values := getattr(chosen, name))}
    folders, primary = existing_folders(chosen.results_dir), chosen_metrics(chosen.primary_metric)
    tables = list(_tables(folders, chosen.sweep, primary, chosen.all_settings))
    _check_names(only, [cells for _, cells, _ in tables])
    if chosen.json:
        rows = [row | {"sweep": name} for name, cells, found in tables for row in as_json(cells, found, only)]
        print(json.dumps(rows))
    else:
        for name, cells, found in tables:
            print("\n".join([*([f"Sweep {name}"] if name else []), *result_lines(cells, found, only=only)]))
    is_finished = any((cells["status"] == "done").any() for _, cells, _ in tables)
    return OK if is_finished and not any(found.errors for *_, found in tables) else FAULT


def _tables(
    folders: Sequence[Path], sweep_ids: Sequence[str] | None, primary: Mapping[str, str], all_settings: bool
) -> Iterator[tuple[str | None, pd.DataFrame, Audit]]:
    """Yield the cells and their audit; of several sweeps that are several studies, those of each with its name."""
    from analysis.audit.audit import audit_folders
    from analysis.read.chosen import compared_cells
    from analysis.read.load import cells_table
    from analysis.read.seeds import repeated_settings
    from tune_sparse.ledger.reader import MergedLedger

    shown = (lambda cells: cells) if all_settings else compared_cells
    cells = cells_table(folders, sweep_ids, primary)
    if repeated_settings(compared_cells(cells)).empty:
        yield None, shown(cells), audit_folders(folders, sweep_ids, primary)
        return
    for name in sweep_ids or [sweep.sweep_id for sweep in MergedLedger(folders).sweeps()]:
        yield name, shown(cells_table(folders, [name], primary)), audit_folders(folders, [name], primary)


def _check_names(only: Mapping[str, Sequence[str]], tables: Sequence[pd.DataFrame]) -> None:
    from analysis.read.seeds import schedule_in

    for name, values in only.items():
        known = {str(value) for cells in tables for value in cells[name]}
        known |= {schedule_in(value) for value in known} if name == "schedule" else set()
        for value in values:
            if value not in known:
                raise unknown_name(name, value, known)
