"""The command line. Exit status: 0 all is well, 1 it ran and found a fault, 2 bad input.

tune-sparse sweep smoke                     # a first try: prune and train a toy model
tune-sparse sweep                           # the study with toy models, on a laptop
tune-sparse status                          # what is finished, and what failed
tune-sparse results                         # the accuracy of what is finished
tune-sparse report                          # tables and figures
tune-sparse prepare matrix --data-dir hub   # download the models and examples of the next line
tune-sparse sweep matrix --data-dir hub     # the study with two models of 7B, on GPUs
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tune_sparse import __version__
from tune_sparse.cli import (
    audit,
    discard,
    doctor,
    evaluate,
    import_,
    merge,
    prepare,
    prune,
    report,
    rerun,
    results,
    search,
    status,
    sweep,
    throughput,
    track,
    tune,
    ui,
    validate,
)
from tune_sparse.cli.command import BAD_INPUT, FAULT, HelpFormat
from tune_sparse.cli.words import paragraph, table
from tune_sparse.errors import DISK_FULL, InputError, unknown_name

COMMANDS = {
    "commands for experiments, in the order of their use": (doctor, prepare, throughput, sweep, search, tune),
    "commands for its results": (status, results, report, audit, rerun, discard, import_, track, ui),
    "commands for single models": (prune, evaluate, merge, validate),
}


EXAMPLES = f"examples:\n{textwrap.indent((__doc__ or '').split(chr(10), 2)[2].rstrip(), '    ')}"
STUDY = paragraph(
    "The study that this program was written for prunes with 3 methods (smallest weights, whole heads and channels, "
    "random weights) to 10 sparsities, trains in 2 modes (pruned weights may change during the training, or not), and "
    "scores 3 tasks: boolq, hellaswag and gsm8k."
)
MORE = "`tune-sparse COMMAND --help` explains a command, its options and its exit status."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # peft with transformers 5.23
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        chosen = _parse(given)
        return int(chosen.command(chosen))
    except InputError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        if not any(message in str(error) for message in DISK_FULL):
            raise
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("tune-sparse: interrupted", file=sys.stderr)
        return FAULT


def _parse(given: Sequence[str]) -> argparse.Namespace:
    root, commands = parsers()
    if given and not given[0].startswith("-") and given[0] not in commands:
        root.error(str(unknown_name("command", given[0], commands)))
    return root.parse_args(given)


def parser() -> argparse.ArgumentParser:
    return parsers()[0]


def parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of everything, and those of the commands."""
    root = argparse.ArgumentParser(
        prog="tune-sparse",
        usage="tune-sparse [--help] [--version] COMMAND ...",
        description=paragraph(
            "Prune language models, fine-tune them at several sparsities (fractions of weights that are zero), and "
            "measure how good they stay at tasks."
        ),
        formatter_class=HelpFormat,
        add_help=False,
    )
    root.add_argument("-h", "--help", action="help", help="show this help and exit")
    version = f"tune-sparse {__version__}"
    root.add_argument("--version", action="version", version=version, help="show the version and exit")
    commands = root.add_subparsers(required=True, prog="tune-sparse", metavar="COMMAND", help=argparse.SUPPRESS)
    root.epilog = "\n\n".join([*_declare_into(commands), STUDY, EXAMPLES, MORE])
    return root, commands.choices


def _declare_into(commands: Any) -> Iterator[str]:
    """Declare every command; yields the list of each kind of them."""
    for heading, modules in COMMANDS.items():
        known = set(commands.choices)
        for module in modules:
            module.declare(commands)
        made = {name: command for name, command in commands.choices.items() if name not in known}
        yield table(heading, {name: command.description or "" for name, command in made.items()})
