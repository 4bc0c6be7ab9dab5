"""audit, rerun, import: whether results can be trusted, and numbers that come from elsewhere."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import DEFAULT_RESULTS, FAULT, OK, add_command, add_results_dirs, existing_folders
from tune_sparse.errors import InputError, unknown_name

AUDIT_EXAMPLE = """examples:
    tune-sparse audit
    tune-sparse audit --results-dir gpu-site cs3-site --all

exit status: 0 no error (there may be warnings), 1 an error, 2 bad input. Every rule is explained in docs/audit.md."""
RERUN_EXAMPLE = """example:
    tune-sparse rerun torch_tiny-llama_boolq_none_s00_dense_84b51b69

exit status: 0 the same, 1 something differs, 2 bad input."""
IMPORT_EXAMPLE = """example:
    tune-sparse import dense.csv

a CSV file with the columns model, task, accuracy (a fraction), source, and n_examples if it is known."""


def add_commands(commands: Any) -> None:
    audit = add_command(commands, "audit", _audit, "what in the results cannot be trusted, and why", AUDIT_EXAMPLE)
    add_results_dirs(audit)
    audit.add_argument("--sweep", nargs="+", metavar="ID", help="only these sweeps (names under sweeps/); default: all")
    audit.add_argument("--all", action="store_true", help="print every finding, not the first few of each rule")
    audit.add_argument("--json", action="store_true", help="print as JSON")

    rerun = add_command(commands, "rerun", _rerun, "repeat a run and compare it with its record", RERUN_EXAMPLE)
    rerun.add_argument("run", help="its folder's name under runs/")
    rerun.add_argument("--results-dir", type=Path, default=DEFAULT_RESULTS)
    rerun.add_argument("--json", action="store_true", help="print as JSON")

    imported = add_command(commands, "import", _import, "take in dense results measured elsewhere", IMPORT_EXAMPLE)
    imported.add_argument("file", type=Path, help="a CSV file, see below")
    imported.add_argument("--results-dir", type=Path, default=DEFAULT_RESULTS)


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


def _rerun(chosen: argparse.Namespace) -> int:
    from trainables.rerun import LOSS_TOLERANCE, rerun
    from tune_sparse.ledger.ledger import Ledger

    [folder] = existing_folders([chosen.results_dir])
    ledger = Ledger(folder)
    runs = [run_id for run_id in ledger.run_ids() if ledger.is_done(run_id)]
    if chosen.run not in runs:
        raise unknown_name("finished run", chosen.run, runs)
    run = ledger.run(chosen.run)
    if run.run_id != chosen.run:
        raise InputError(
            f"the settings of {chosen.run} must be those of its record, they are of {run.run_id}. "
            "`tune-sparse audit` says more."
        )
    found = rerun(run, ledger)
    if chosen.json:
        print(json.dumps({"run": chosen.run} | asdict(found)))
    else:
        how = (
            "to the last bit"
            if found.is_exact
            else f"accuracies within a standard error, other numbers within {LOSS_TOLERANCE:.0%}: the hardware or the "
            "versions are not those of the record"
        )
        print(f"{chosen.run}: {len(found.differences)} differences ({how})")
        print("".join(f"  {difference}\n" for difference in found.differences), end="")
        print(f"{found.answered_otherwise} of {found.examples} examples have another outcome.")
        if found.not_recorded:
            print(f"Not in the record, so not compared: {', '.join(sorted(found.not_recorded))}.")
    return FAULT if found.differences else OK


def _import(chosen: argparse.Namespace) -> int:
    from analysis.read.imported import import_results

    [folder] = existing_folders([chosen.results_dir])
    records = import_results(chosen.file, folder)
    print("".join(f"{r.model}, {r.task}: {r.accuracy:g} (imported from {r.source})\n" for r in records), end="")
    return OK
