"""prune: masks, statistics and histograms of one model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.cli.command import OK, add_command
from tune_sparse.cli.settings import DATA_DIR
from tune_sparse.cli.words import files, methods, models, paragraph, table, tasks, words
from tune_sparse.config import Protocol
from tune_sparse.config.options import rule
from tune_sparse.config.protocol import PUBLISHED, PUBLISHED_MEANING, RECOVERIES, without_published
from tune_sparse.data.task_types import TextTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import DISK_FULL, InputError, unknown_name

if TYPE_CHECKING:
    from tune_sparse.data.splits import Encoded

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def declare(commands: Any) -> None:
    prune = add_command(
        commands,
        "prune",
        _prune,
        "compute the masks of a model for pruning methods and sparsities, with statistics and histograms",
        examples=(
            "prune tiny-llama --methods unstructured structured random",
            "prune ./my-llama --methods wanda sparsegpt --sparsities 0.5 --calibration text.txt",
            "prune ./my-llama --calibration text.txt --checkpoints --recover reconstruct",
        ),
        ok="all files are written",
        fault="the disk is full",
        notes=[
            words("sparsity", "mask", "example", "calibration", "structured"),
            models(trains=False, downloads=False, classes="Llama, Mistral, Mixtral, GPT-2 or OPT"),
            methods(),
            _written(),
            tasks(),
            files(),
        ],
    )
    prune.add_argument("model", metavar="MODEL", help="model to prune, see below")
    _add_what_into(prune.add_argument_group("what to prune"))
    _add_calibration_into(prune.add_argument_group("calibration, for the methods that need it"))
    _add_recovery_into(prune.add_argument_group("recovery after pruning"))
    _add_files_into(prune.add_argument_group("what to write"))


def _add_what_into(group: Any) -> None:
    group.add_argument(
        "--methods",
        nargs="+",
        default=["unstructured"],
        metavar="METHOD",
        help="pruning methods, listed below (default: unstructured)",
    )
    group.add_argument(
        "--sparsities",
        nargs="+",
        type=float,
        default=list(SPARSITIES),
        metavar="FRACTION",
        help="sparsities, above 0 and below 1, in rising order; the weights are read once for all of them "
        f"(default: {' '.join(map(str, SPARSITIES))})",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the random numbers by which the method random prunes (default: 0)",
    )


def _add_calibration_into(group: Any) -> None:
    group.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="calibration examples: a task of those listed below, whose training examples are taken from --data-dir; "
        f"or the path of a text file; or `{PUBLISHED}`: {PUBLISHED_MEANING} in --data-dir (default: none, which suits "
        "the methods that need no calibration)",
    )
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="DATA",
        help=f"where --calibration names a task or is `{PUBLISHED}`: {DATA_DIR} (default: none, so it must be given)",
    )
    group.add_argument(
        "--calibration-tokens",
        type=int,
        default=Protocol.calibration_tokens,
        metavar="N",
        help="number of tokens to calibrate on, or all there are if they are fewer; sparsegpt wants at least two for "
        f"each input of a layer (default: {Protocol.calibration_tokens})",
    )
    group.add_argument(
        "--calibration-window",
        type=int,
        default=Protocol.calibration_window,
        metavar="N",
        help="tokens that the model reads at once in calibration, or its context if that is less (default: "
        f"{Protocol.calibration_window})",
    )
    group.add_argument(
        "--sequential",
        action="store_true",
        help="prune layer after layer, measuring each with all earlier layers pruned, as the authors of wanda and "
        "sparsegpt do (default: measure the unpruned model once)",
    )


def _add_recovery_into(group: Any) -> None:
    meant = "; ".join(f"{name}: {meaning}" for name, meaning in RECOVERIES.items())
    group.add_argument(
        "--recover",
        default=Protocol.recover,
        metavar="NAME",
        help=f"recovery of each pruned model, on the calibration examples ({meant}); with --checkpoints (default: "
        f"{Protocol.recover})",
    )


def _add_files_into(group: Any) -> None:
    group.add_argument(
        "--output", type=Path, default=Path("masks"), metavar="OUTPUT", help="folder for all files (default: masks)"
    )
    group.add_argument(
        "--format",
        default="safetensors",
        metavar="NAME",
        help="format of the masks: safetensors or pt, one file for each sparsity; or levels, one file for at most 15 "
        "sparsities, which says of each weight, in 4 bits, at how many of them it is kept (default: safetensors)",
    )
    group.add_argument("--checkpoints", action="store_true", help="write the pruned model of each sparsity, too")
    group.add_argument(
        "--mdl",
        action="store_true",
        help="with --checkpoints: write a model.mdl of Cerebras into each folder (default: safetensors files)",
    )
    group.add_argument(
        "--compact",
        action="store_true",
        help="with structured methods: write a smaller model of each sparsity, too, whose pruned heads and channels "
        "are cut out",
    )


def _written() -> str:
    written = {
        "masks_sparsityNN_METHOD.safetensors": "masks of the sparsity of NN percent; or .pt with --format pt",
        "levels_METHOD.safetensors": "masks of all sparsities, with --format levels",
        "stats_sparsityNN_METHOD.json": "statistics of the masks, for each layer",
        "histogram_sparsityNN_METHOD.png": "histogram of the absolute values of pruned and kept weights",
        "checkpoint_sparsityNN_METHOD": "folder of the pruned model, with --checkpoints",
        "recovered_sparsityNN_METHOD": "folder of the recovered model, with --recover reconstruct; its recovery is in "
        "the statistics, for each layer",
        "compact_sparsityNN_METHOD": "folder of the smaller model, with --compact",
    }
    return f"{table('files in OUTPUT/MODEL', written)}\n\n" + paragraph(
        "Here MODEL is the last part of the model's path or Hugging Face id, without @REVISION: masks/my-llama for "
        "./my-llama."
    )


def _prune(chosen: argparse.Namespace) -> int:
    from tune_sparse.pruning.methods import method_named
    from tune_sparse.pruning.prune_checkpoint import Request, run

    is_calibrated = chosen.recover != "none" or any(method_named(name).is_calibrated for name in chosen.methods)
    by = calibration_settings(chosen)
    examples = calibration_windows(chosen, by) if is_calibrated and chosen.calibration else ()
    request = Request(
        model=chosen.model,
        methods=chosen.methods,
        sparsities=chosen.sparsities,
        out=chosen.output,
        seed=chosen.seed,
        format=chosen.format,
        checkpoints=chosen.checkpoints,
        mdl=chosen.mdl,
        compact=chosen.compact,
        calibration=by,
        examples=examples,
        sequential=by["calibration_order"] == "sequential",
        recover=chosen.recover,
    )
    try:
        run(request)
    except OSError as error:
        if not any(message in str(error) for message in DISK_FULL):
            raise
        raise InputError(
            f"pruning needs room for what it writes, {chosen.output} ran full: {error}. Free some, or give "
            "another --output."
        ) from error
    return OK


def calibration_settings(chosen: argparse.Namespace) -> Mapping[str, Any]:
    """Name the settings of a calibration as a sweep does. Raises `InputError` for a size that makes no sense."""
    settings = without_published(
        {
            "calibration": chosen.calibration,
            "calibration_tokens": chosen.calibration_tokens,
            "calibration_window": chosen.calibration_window,
            "calibration_order": "sequential" if chosen.sequential else "dense",
        }
    )
    for name in ("calibration_tokens", "calibration_window"):
        rule(settings[name] >= 2, f"{name} must be at least 2", settings[name], "Give a larger number.")
    return settings


def calibration_windows(chosen: argparse.Namespace, by: Mapping[str, Any]) -> Sequence[Encoded]:
    """Read training examples of a task, or a text, as the model's tokens."""
    from tune_sparse.data.sources import examples_folder
    from tune_sparse.data.splits import calibration_text, encode_training, load_splits
    from tune_sparse.models.checkpoints import load_tokenizer
    from tune_sparse.pruning.calibration import example_windows, text_windows
    from tune_sparse.pruning.streaming import open_checkpoint

    source, tokens = by["calibration"], by["calibration_tokens"]
    checkpoint = open_checkpoint(chosen.model)
    tokenizer, window = load_tokenizer(checkpoint.path), min(by["calibration_window"], checkpoint.dims.max_positions)
    if Path(source).is_file():
        return text_windows(tokenizer, _read_text(Path(source)), tokens, window)
    if source not in TASKS:
        raise unknown_name("task or text file", source, TASKS)
    task, folder = TASKS[source], examples_folder(chosen.data_dir, [source])
    if isinstance(task, TextTask):
        return text_windows(tokenizer, calibration_text(source, folder), tokens, window)
    train = load_splits(task, folder, Protocol()).train
    return example_windows(encode_training(tokenizer, task, train, window, None), tokens, window)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"a calibration text must be UTF-8, {path} is not: {error}. Save it as UTF-8.") from error
