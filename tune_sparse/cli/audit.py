"""audit: whether results can be trusted."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from tune_sparse.cli.command import (
    FAULT,
    OK,
    add_command,
    add_json,
    add_results_dirs,
    add_sweep_filter,
    existing_folders,
)
from tune_sparse.cli.words import RUN_WORDS, words
from tune_sparse.errors import unknown_name


def declare(commands: Any) -> None:
    audit = add_command(
        commands,
        "audit",
        _audit,
        "check the recorded results against each other, and list what cannot be trusted and why",
        examples=("audit", "audit --results-dir ./gpu-results ./cs3-results --all"),
        ok="no error was found; there may be warnings",
        fault="an error was found",
        notes=[words("audit", *RUN_WORDS, "results folder")],
    )
    add_results_dirs(audit)
    add_sweep_filter(audit)
    audit.add_argument("--all", action="store_true", help="print every finding (default: 5 for each check that failed)")
    add_json(audit, "all errors and warnings")


def _audit(chosen: argparse.Namespace) -> int:
    from analysis.audit.audit import audit
    from analysis.read.results import read_results

    results = read_results(existing_folders(chosen.results_dir))
    known = [sweep.sweep_id for sweep in results.sweeps]
    for name in chosen.sweep or ():
        if name not in known:
            raise unknown_name("sweep", name, known)
    found = audit(results if chosen.sweep is None else read_results(chosen.results_dir, chosen.sweep))
    if chosen.json:
        print(json.dumps({"runs": found.runs, "findings": [asdict(finding) for finding in found.findings]}))
    else:
        print("\n".join([*found.lines(len(found.findings) if chosen.all else 5), found.summary()]))
    return FAULT if found.errors else OK
