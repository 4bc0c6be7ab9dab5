"""The command line. Exit status: 0 all is well, 1 it ran and found a fault, 2 bad input.

tune-sparse sweep                                  # 360 cells on toy models, on a laptop
tune-sparse sweep smoke                            # 24 of them
tune-sparse sweep matrix --dry-run                 # what the 7B matrix would run
tune-sparse sweep --models ./my-llama --tasks boolq --data-dir ./rows --set steps=100
tune-sparse prune ./my-llama --methods unstructured structured --sparsities 0.5 0.7
tune-sparse status && tune-sparse report && tune-sparse ui
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

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
    search,
    status,
    sweep,
    throughput,
    track,
    ui,
    validate,
)
from tune_sparse.cli.command import BAD_INPUT, FAULT
from tune_sparse.errors import DISK_FULL, InputError

COMMANDS = (
    *(sweep, search, prepare, prune, evaluate, validate, merge, throughput),
    *(status, rerun, discard, audit, report, track, import_, ui, doctor),
)
"""In the order of `--help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # peft with transformers 5.23
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    chosen = parser().parse_args(arguments)
    try:
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


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="tune-sparse",
        description="How sparse can a language model be, and stay good at a task?",
        epilog=f"examples:\n{(__doc__ or '').split(chr(10), 2)[2]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.declare(commands)
    return root
