"""track: MLflow filled from the ledger."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_results_dirs, existing_folders
from tune_sparse.cli.words import baselines, paragraph, words


def declare(commands: Any) -> None:
    track = add_command(
        commands,
        "track",
        _track,
        "bring MLflow up to date with the recorded results",
        examples=("track", "track --tracking-uri http://127.0.0.1:5000 --baselines"),
        ok="MLflow has every result",
        fault="MLflow could not be reached; give the same command again to go on",
        notes=[
            words("MLflow", "published numbers", "results folder"),
            baselines(),
            paragraph(
                "A sweep does this while it runs. The command is for results that MLflow has missed or lost, and for "
                "another store. It adds what is missing, replaces what has changed, and never makes a result twice."
            ),
        ],
    )
    add_results_dirs(track)
    track.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="address of the MLflow store (default: the variable MLFLOW_TRACKING_URI, or else mlflow.db in the first "
        "results folder)",
    )
    track.add_argument(
        "--baselines",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="import published numbers, too: the built-in ones, and those of these CSV files, if any, with the "
        "columns below (default: import none)",
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
