"""audit: whether results can be trusted."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_results_dirs, add_sweep_filter, existing_folders
from tune_sparse.errors import unknown_name

EXAMPLE = """examples:
    tune-sparse audit
    tune-sparse audit --results-dir gpu-site cs3-site --all

exit status: 0 no error (there may be warnings), 1 an error, 2 bad input. Every rule is explained in docs/audit.md."""


def declare(commands: Any) -> None:
    audit = add_command(commands, "audit", _audit, "what in the results cannot be trusted, and why", EXAMPLE)
    add_results_dirs(audit)
    add_sweep_filter(audit)
    audit.add_argument("--all", action="store_true", help="print every finding, not the first few of each rule")
    audit.add_argument("--json", action="store_true", help="print as JSON")


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
