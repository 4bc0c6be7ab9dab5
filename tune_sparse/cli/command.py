"""Shared by the commands: exit statuses, how a command and its help are declared, options that several have."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tune_sparse.cli.words import WIDTH, paragraph, table
from tune_sparse.config import SweepConfig
from tune_sparse.data.tasks import EXAMPLE
from tune_sparse.errors import InputError

OK, FAULT, BAD_INPUT = 0, 1, 2
DEFAULT_RESULTS = SweepConfig.__dataclass_fields__["results_dir"].default


class HelpFormat(argparse.RawDescriptionHelpFormatter):
    """A help of `WIDTH` columns whatever the terminal, in which the name of an option is never divided."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=WIDTH, max_help_position=26)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    examples: Sequence[str],
    fault: str,
    ok: str = "the command succeeded",
    bad: str = "an option, a name or a file is wrong; nothing was run",
    notes: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """Declare a command.

    summary: a sentence without its full stop, in lower case. examples: the arguments after `tune-sparse`. ok, fault,
    bad: the meaning of exit status 0, 1 and 2. notes: parts of the help between the options and the examples.
    """
    status = {str(OK): ok, str(FAULT): fault, str(BAD_INPUT): bad}
    shown = "\n".join(f"    tune-sparse {example}" for example in examples)
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=paragraph(f"{summary[0].upper()}{summary[1:]}."),
        epilog="\n\n".join([*notes, f"examples:\n{shown}", table("exit status", status)]),
        formatter_class=HelpFormat,
        add_help=False,
    )
    command.set_defaults(command=run)
    command.add_argument("-h", "--help", action="help", help="show this help and exit")
    return command


def add_results_dir(command: Any, help: str = "results folder") -> None:
    command.add_argument(
        "--results-dir",
        type=Path,
        default=DEFAULT_RESULTS,
        metavar="RESULTS",
        help=f"{help} (default: {DEFAULT_RESULTS})",
    )


def add_results_dirs(command: Any) -> None:
    command.add_argument(
        "--results-dir",
        type=Path,
        nargs="+",
        default=[DEFAULT_RESULTS],
        metavar="RESULTS",
        help=f"results folders, read as if they were one (default: {DEFAULT_RESULTS})",
    )


def add_json(command: Any, content: str) -> None:
    command.add_argument("--json", action="store_true", help=f"print JSON instead of text: {content}")


def add_run(command: Any, help: str) -> None:
    command.add_argument("run", metavar="RUN", help=help)


def add_sweep_filter(command: Any) -> None:
    command.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME",
        help="read only these sweeps: names of files in RESULTS/sweeps, without .json (default: all sweeps)",
    )


def add_primary_metrics(command: Any) -> None:
    command.add_argument(
        "--primary-metric",
        nargs="+",
        default=[],
        metavar="TASK=METRIC",
        help=f"judge tasks by another of their metrics, listed below, for example {EXAMPLE}; nothing is trained or "
        "scored again (default: the metric of the task)",
    )


def existing_folders(folders: Sequence[Path]) -> list[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"a results folder must exist, {folder} does not. Run `tune-sparse sweep` first.")
    return list(folders)
