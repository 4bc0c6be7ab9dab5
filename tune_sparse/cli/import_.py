"""import: dense results that were measured elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import OK, add_command, add_results_dir, existing_folders

EXAMPLE = """example:
    tune-sparse import dense.csv

a CSV file with the columns model, task, accuracy (a fraction), source, and n_examples if it is known."""


def declare(commands: Any) -> None:
    imported = add_command(commands, "import", _import, "take in dense results measured elsewhere", EXAMPLE)
    imported.add_argument("file", type=Path, help="a CSV file, see below")
    add_results_dir(imported)


def _import(chosen: argparse.Namespace) -> int:
    from analysis.read.imported import import_results

    [folder] = existing_folders([chosen.results_dir])
    records = import_results(chosen.file, folder)
    print("".join(f"{r.model}, {r.task}: {r.accuracy:g} (imported from {r.source})\n" for r in records), end="")
    return OK
