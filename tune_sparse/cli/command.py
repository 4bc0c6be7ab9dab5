"""Shared by the commands: exit statuses, how a command is declared, folders of results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tune_sparse.config import SweepConfig
from tune_sparse.errors import InputError

OK, FAULT, BAD_INPUT = 0, 1, 2
DEFAULT_RESULTS = SweepConfig.__dataclass_fields__["results_dir"].default


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=epilog or f"example:\n    tune-sparse {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run)
    return command


def add_results_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results-dir", type=Path, default=DEFAULT_RESULTS)


def add_results_dirs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results-dir", type=Path, nargs="+", default=[DEFAULT_RESULTS], metavar="DIR")


def add_sweep_filter(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sweep", nargs="+", metavar="ID", help="only these sweeps (names under sweeps/); default: all"
    )


def existing_folders(folders: Sequence[Path]) -> list[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"a results folder must exist, {folder} does not. Run `tune-sparse sweep` first.")
    return list(folders)
