"""status: done, failed and missing cells."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_json, add_results_dirs, existing_folders
from tune_sparse.cli.words import RUN_WORDS, paragraph, words
from tune_sparse.config.axes import point_text


def declare(commands: Any) -> None:
    status = add_command(
        commands,
        "status",
        _status,
        "count how many cells (combinations of model, task and so on) are finished, running, failed or missing in all "
        "sweeps, say why runs failed, and of sweeps with --find between which levels each curve stops passing",
        examples=("status", "status --results-dir ./gpu-results ./cs3-results --json"),
        ok="every cell is finished, running, stopped early, or not needed by the --find that asked for it",
        fault="a cell failed or is missing",
        notes=[
            words("cell", *RUN_WORDS, "results folder"),
            paragraph(
                "A cell is missing if a sweep asked for it and its run has not been started. The command can be used "
                "while a sweep runs."
            ),
        ],
    )
    add_results_dirs(status)
    add_json(status, "the counts and the reasons")


def _point(row: Any) -> str:
    """The values of axes in a row, for people."""
    from analysis.read.seeds import AXIS

    values = [(name, row[name]) for name in row.index if name.startswith(AXIS) and row[name] == row[name]]
    return f" ({point_text(tuple((name.removeprefix(AXIS), value) for name, value in values))})" if values else ""


def _status(chosen: argparse.Namespace) -> int:
    from analysis.read.load import cells_table
    from tune_sparse.ledger.curves import known_curves
    from tune_sparse.ledger.lease import likely_owner
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.ledger.reader import MergedLedger
    from tune_sparse.sweep.progress import duration

    folders = existing_folders(chosen.results_dir)
    cells = cells_table(folders).drop_duplicates("cell_id")
    ledgers = [Ledger(folder) for folder in folders]
    running = {run_id for ledger in ledgers if likely_owner(ledger.folder) for run_id in ledger.running()}
    cells.loc[cells["run_id"].isin(running) & (cells["status"] != "done"), "status"] = "running"
    merged = MergedLedger(folders)
    curves = [curve for sweep in merged.sweeps() for curve in known_curves(sweep, merged.record)]
    asked = {run for sweep in merged.sweeps() if not sweep.config.get("find") for run in sweep.run_ids}
    levels = {is_decided: set[str]() for is_decided in (True, False)}
    for curve in curves:
        levels[curve.is_decided].update(*map(curve.curve.needed, curve.curve.runs))
    needless = levels[True] - levels[False] - asked
    cells.loc[cells["run_id"].isin(needless) & (cells["status"] == "missing"), "status"] = "not needed"
    runs = cells.drop_duplicates("run_id")
    counts, failed = cells["status"].value_counts(), runs[runs["status"] == "failed"]
    left = int((~runs["status"].isin(["done", "failed", "stopped", "not needed"])).sum())
    done = runs.loc[runs["status"] == "done", "run_id"]
    seconds = [r.measured["trial_seconds"] for run_id in done if (r := merged.record(run_id))]
    eta = left * statistics.median(seconds) / len(running) if running and seconds else None
    if chosen.json:
        reasons = dict(zip(failed["run_id"], failed["error"], strict=True))
        values = {"cells": len(cells), "by_status": counts.to_dict(), "failed": reasons, "eta_seconds": eta}
        values |= {"curves": [curve.as_json() for curve in curves]}
        print(json.dumps(values))
    else:
        print(
            f"{len(cells)} cells: " + (", ".join(f"{n} {status}" for status, n in counts.items()) or "none requested")
        )
        for _, row in failed.iterrows():
            print(f"  {row['run_id']}{_point(row)}: {row['error']}")
        for curve in curves:
            print(f"  {curve.line}")
        if eta is not None:
            print(f"about {duration(eta)} left")
    return OK if counts.index.isin(["done", "running", "stopped", "not needed"]).all() else FAULT
