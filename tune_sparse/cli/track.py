"""track: MLflow filled from the ledger."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_results_dirs, existing_folders


def declare(commands: Any) -> None:
    track = add_command(commands, "track", _track, "fill or rebuild MLflow from the ledger")
    add_results_dirs(track)
    track.add_argument(
        "--tracking-uri", help="of MLflow; default: MLFLOW_TRACKING_URI, or SQLite in the first results folder"
    )
    track.add_argument(
        "--baselines",
        type=Path,
        nargs="*",
        metavar="CSV",
        help="import published numbers too: the built-in ones, and those of these files (docs/baselines.md)",
    )


def _track(chosen: argparse.Namespace) -> int:
    from tune_sparse.ledger.reader import MergedLedger
    from tune_sparse.tracking.sync import chosen_uri, track_ledger

    folders = existing_folders(chosen.results_dir)
    uri = chosen_uri(chosen.tracking_uri, folders[0])
    published = _published(folders, chosen.baselines)
    try:
        tracked = track_ledger(MergedLedger(folders), uri)
    except OSError as error:
        print(f"tune-sparse: MLflow at {uri} is not up to date: {error}. The same command goes on.", file=sys.stderr)
        return FAULT
    print(f"{tracked} runs of {', '.join(map(str, folders))} are in {uri}")
    if published is not None:
        from tune_sparse.tracking.baselines import track_published

        print(f"{track_published(published, uri)} published runs are in {uri}, in an experiment of their own")
    return OK


def _published(folders: list[Path], files: list[Path] | None) -> list[Any] | None:
    """The published runs to import, checked before anything is tracked."""
    if files is None:
        return None
    from analysis.baselines.published import as_runs, load_published
    from tune_sparse.ledger.ledger import Ledger

    models = {cell["model"] for folder in folders for sweep in Ledger(folder).sweeps() for cell in sweep.cells}
    return as_runs(load_published(files, models))
