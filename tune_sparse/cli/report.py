"""report: tables, figures and findings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_results_dirs, add_sweep_filter, existing_folders
from tune_sparse.errors import NotReadyError


def declare(commands: Any) -> None:
    report = add_command(commands, "report", _report, "tables, figures and findings from the finished runs")
    add_results_dirs(report)
    add_sweep_filter(report)
    report.add_argument(
        "--baselines",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="published numbers to compare with, besides the built-in ones (docs/baselines.md)",
    )
    report.add_argument("--bundle", type=Path, metavar="DIR", help="a new folder for all that a paper's artifact needs")


def _report(chosen: argparse.Namespace) -> int:
    from analysis.report.bundle import check_bundle, write_bundle
    from analysis.report.report import write_report

    folders = existing_folders(chosen.results_dir)
    if chosen.bundle:
        check_bundle(chosen.bundle)
    try:
        report = write_report(folders, chosen.sweep, chosen.baselines)
    except NotReadyError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    print("\n".join(report.lines))
    if chosen.bundle:
        print(f"{write_bundle(folders, chosen.bundle)} files for publication: {chosen.bundle}")
    return OK if report.done and not report.errors else FAULT
