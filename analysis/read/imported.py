"""Numbers that a lab measured before, elsewhere: imported as records of their own kind, and never taken for runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError, unknown_name
from tune_sparse.files import read_json, write_json
from tune_sparse.identity import hash_json

REQUIRED = ("model", "task", "accuracy", "source")


@dataclass(frozen=True)
class Imported:
    """The accuracy of a dense, tuned model that no run of ours produced."""

    model: str
    task: str
    accuracy: float
    source: str
    """who measured it, and how: shown with the number"""
    n_examples: int | None = None

    @property
    def record_id(self) -> str:
        return f"imported_{self.model}_{self.task}_{hash_json(asdict(self))[:8]}"


def import_results(file: Path, results_dir: Path) -> list[Imported]:
    """Write the rows of a CSV file under `imported/`; the same row again changes nothing.

    Raises `InputError` for a missing column, an unknown task, or an accuracy outside [0, 1], with file and line.
    """
    records = _rows(file)
    folder = results_dir / "imported"
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        write_json(folder / f"{record.record_id}.json", asdict(record))
    return records


def imported_records(results_dir: Path) -> list[Imported]:
    """Read the imported records of a results folder. Raises `InputError` for a record that does not parse."""
    found = []
    for path in sorted((results_dir / "imported").glob("*.json")):
        try:
            found.append(_checked(read_json(path)))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}") from error
    return found


def _rows(file: Path) -> list[Imported]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"an import needs a readable CSV file: {error}. Fix the path.") from error
    reader = csv.DictReader(text.splitlines())
    known = [f.name for f in fields(Imported)]
    for name in reader.fieldnames or ():
        if name not in known:
            raise unknown_name("column", name, known)
    missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{file} needs the columns {', '.join(REQUIRED)}, it has no {', '.join(missing)}. Add them.")
    records = []
    for number, row in enumerate(reader, start=2):
        try:
            records.append(_checked(row))
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}:{number}: {error}") from error
    if not records:
        raise InputError(f"{file} must have at least one row under its header, got none. Add rows.")
    return records


def _checked(row: Mapping[str, Any]) -> Imported:
    accuracy, count = float(row["accuracy"]), row.get("n_examples")
    if not 0 <= accuracy <= 1:
        hint = f"Did you mean {accuracy / 100:g}?" if 1 < accuracy <= 100 else "Give a fraction."
        raise InputError(f"an accuracy is a fraction of the examples, in [0, 1], got {accuracy:g}. {hint}")
    if row["task"] not in TASKS:
        raise unknown_name("task", row["task"], TASKS)
    if not (row["model"] and row["source"]):
        raise InputError(f"model and source must not be empty, got {dict(row)}. Say whose number it is.")
    return Imported(row["model"], row["task"], accuracy, row["source"], int(count) if count else None)
