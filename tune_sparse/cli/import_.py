"""import: dense results that were measured elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import OK, add_command, add_results_dir, existing_folders
from tune_sparse.cli.words import table, words
from tune_sparse.data.tasks import TASKS

COLUMNS = {
    "model": "name of the model in the report: the last part of its path or Hugging Face id",
    "task": f"one of {', '.join(name for name, task in TASKS.items() if task.chance is not None)}",
    "accuracy": "fraction of the test examples that are right, from 0 to 1",
    "source": "who measured it, and how: shown beside the number",
    "n_examples": "number of test examples; the column can be left out",
}


def declare(commands: Any) -> None:
    imported = add_command(
        commands,
        "import",
        _import,
        "import results of unpruned models that were measured elsewhere, to show them in the report beside yours",
        examples=("import dense.csv",),
        fault="the disk is full",
        notes=[
            words("results folder"),
            table("columns of the CSV file", COLUMNS),
            "for example:\n    model,task,accuracy,source,n_examples\n    llama-7b,boolq,0.765,our lab in 2024,3270",
            "A line that was imported before changes nothing.",
        ],
    )
    imported.add_argument("file", type=Path, metavar="FILE", help="CSV file to read")
    add_results_dir(imported)


def _import(chosen: argparse.Namespace) -> int:
    from analysis.read.imported import import_results

    [folder] = existing_folders([chosen.results_dir])
    records = import_results(chosen.file, folder)
    print("".join(f"{r.model}, {r.task}: {r.accuracy:g} (imported from {r.source})\n" for r in records), end="")
    return OK
