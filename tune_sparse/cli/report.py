"""report: tables, figures and findings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import (
    FAULT,
    OK,
    add_command,
    add_primary_metrics,
    add_results_dirs,
    add_sweep_filter,
    existing_folders,
)
from tune_sparse.cli.words import RUN_WORDS, baselines, metrics, paragraph, words
from tune_sparse.data.tasks import chosen_metrics
from tune_sparse.errors import NotReadyError


def declare(commands: Any) -> None:
    report = add_command(
        commands,
        "report",
        _report,
        "audit the finished runs, and write tables, figures and a summary of them to the folder analysis in the "
        "results folder",
        examples=("report", "report --results-dir ./gpu-results ./cs3-results --bundle ./artifact"),
        ok="the report is written, and its audit found no error",
        fault="the report is written, but its audit found an error; or no run is finished",
        notes=[
            words(*RUN_WORDS, "audit", "published numbers", "results folder"),
            paragraph(
                "Open RESULTS/analysis/report.html in a browser; the same folder has all tables as CSV and all "
                "figures. Of several results folders it is the first one that holds the report."
            ),
            metrics(),
            baselines(),
        ],
    )
    add_results_dirs(report)
    add_sweep_filter(report)
    add_primary_metrics(report)
    report.add_argument(
        "--baselines",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="CSV files of published numbers to compare with, besides the built-in ones, with the columns below "
        "(default: none)",
    )
    report.add_argument(
        "--bundle",
        type=Path,
        metavar="BUNDLE",
        help="copy the report, the records of runs, sweeps, searches, evaluations and throughput, the versions of "
        "packages, and checksums to this folder, for publication; trained weights and mlflow.db are left out; the "
        "folder must not exist yet (default: none)",
    )


def _report(chosen: argparse.Namespace) -> int:
    from analysis.report.bundle import check_bundle, write_bundle
    from analysis.report.report import write_report

    folders, primary_metrics = existing_folders(chosen.results_dir), chosen_metrics(chosen.primary_metric)
    if chosen.bundle:
        check_bundle(chosen.bundle)
    try:
        report = write_report(folders, chosen.sweep, chosen.baselines, primary_metrics)
    except NotReadyError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    print("\n".join(report.lines))
    if chosen.bundle:
        print(f"{write_bundle(folders, chosen.bundle)} files for publication: {chosen.bundle}")
    return OK if report.done and not report.errors else FAULT
