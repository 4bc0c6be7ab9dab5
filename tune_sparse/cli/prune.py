"""prune: masks, statistics and histograms of one model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.cli.command import OK, add_command
from tune_sparse.cli.settings import given_flags
from tune_sparse.config import Protocol
from tune_sparse.data.task_types import TextTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import DISK_FULL, InputError, unknown_name
from tune_sparse.pruning.methods import METHODS

if TYPE_CHECKING:
    from tune_sparse.data.splits import Encoded

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def declare(commands: Any) -> None:
    prune = add_command(
        commands, "prune", _prune, "masks, statistics and histograms of one model, all levels in one pass", _epilog()
    )
    prune.add_argument(
        "model", metavar="MODEL", help="the name of a toy model, a checkpoint folder, or a fetched hub id"
    )
    prune.add_argument("--methods", nargs="+", default=["unstructured"], metavar="METHOD", help="see below")
    prune.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="SPARSITY")
    prune.add_argument("--out", type=Path, default=Path("masks"), metavar="DIR", help="default: masks")
    prune.add_argument("--seed", type=int, help="of random scores")
    prune.add_argument("--format", help="safetensors (default) or pt: a file a level; levels: one packed")
    prune.add_argument("--checkpoints", action="store_true", help="write each pruned checkpoint too")
    prune.add_argument("--compact", action="store_true", help="write each structured checkpoint in its smaller form")
    prune.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="a task, whose training rows are used, a text such as wikitext2, or a text file",
    )
    prune.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the task, `hub` or `synthetic`")
    count, tokens = Protocol.calibration_examples, Protocol.calibration_tokens
    prune.add_argument("--calibration-rows", type=int, default=count, metavar="ROWS")
    prune.add_argument("--calibration-tokens", type=int, default=tokens, metavar="TOKENS", help="of a row, at most")
    prune.add_argument("--sequential", action="store_true", help="prune block after block, as published")


def _epilog() -> str:
    return (
        f"methods: {', '.join(METHODS)}\n\n"
        "wanda, sparsegpt, gradient, taylor and owl need --calibration.\n\n"
        "examples:\n    tune-sparse prune tiny-llama --methods unstructured structured random\n"
        "    tune-sparse prune ./my-llama --methods wanda sparsegpt --sparsities 0.5 --calibration text.txt"
    )


def _prune(chosen: argparse.Namespace) -> int:
    from tune_sparse.pruning.methods import method_named
    from tune_sparse.pruning.prune_checkpoint import Request, run

    calibrated = [name for name in chosen.methods if method_named(name).is_calibrated]
    rows = calibration_rows(chosen) if calibrated and chosen.calibration else ()
    request = Request(
        model=chosen.model,
        methods=chosen.methods,
        sparsities=chosen.sparsities,
        out=chosen.out,
        **given_flags(chosen, ("seed", "format")),
        checkpoints=chosen.checkpoints,
        compact=chosen.compact,
        calibration={"source": chosen.calibration, "rows": len(rows), "tokens": chosen.calibration_tokens},
        examples=rows,
        sequential=chosen.sequential,
    )
    try:
        run(request)
    except OSError as error:
        if not any(message in str(error) for message in DISK_FULL):
            raise
        raise InputError(
            f"pruning needs room for what it writes, {chosen.out} ran full: {error}. Free some, or give another --out."
        ) from error
    return OK


def calibration_rows(chosen: argparse.Namespace) -> Sequence[Encoded]:
    """Rows of a task's training split, or pieces of a text file, as the model's tokens."""
    from tune_sparse.data.sources import examples_folder
    from tune_sparse.data.splits import calibration_text, encode_training, load_splits
    from tune_sparse.models.checkpoints import load_tokenizer
    from tune_sparse.pruning.calibration import checked_examples, text_examples
    from tune_sparse.pruning.streaming import open_checkpoint

    source, count, tokens = chosen.calibration, chosen.calibration_rows, chosen.calibration_tokens
    if count < 1 or tokens < 2:
        raise InputError(f"calibration needs a row of at least 2 tokens, got {count} rows of {tokens}. Raise them.")
    checkpoint = open_checkpoint(chosen.model)
    tokenizer, tokens = load_tokenizer(checkpoint.path), min(tokens, checkpoint.dims.max_positions)
    if Path(source).is_file():
        return text_examples(tokenizer, _read_text(Path(source)), count, tokens)
    if source not in TASKS:
        raise unknown_name("task or text file", source, TASKS)
    task, folder = TASKS[source], examples_folder(chosen.data_dir, [source])
    if isinstance(task, TextTask):
        return text_examples(tokenizer, calibration_text(source, folder), count, tokens)
    train = load_splits(task, folder, Protocol()).train[:count]
    return checked_examples(encode_training(tokenizer, task, train, tokens, None), count)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"a calibration text must be UTF-8, {path} is not: {error}. Save it as UTF-8.") from error
