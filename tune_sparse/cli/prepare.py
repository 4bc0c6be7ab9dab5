"""prepare: what a sweep needs, fetched or trained."""

from __future__ import annotations

import argparse
from typing import Any

from tune_sparse.cli.command import OK, add_command
from tune_sparse.cli.sweep_options import add_sweep_options, sweep_config
from tune_sparse.cli.words import models, paragraph, presets, tasks, words
from tune_sparse.config import HUB

TEXTS = {
    "config": "YAML file with settings of a sweep, as `tune-sparse sweep --config` takes; models, tasks and data_dir "
    "are used here, where no option gives them (default: none)",
    "models": "models to download or train (default: those of the preset, which is toy if none is named)",
    "tasks": "tasks whose examples are downloaded if --data-dir is hub; TASK+TASK names several (default: boolq "
    "hellaswag gsm8k)",
    "data_dir": "`hub` downloads the examples of the tasks from the Hugging Face Hub; with `synthetic` or a folder "
    "there is nothing to download (default: none, which downloads no examples)",
}
PLACES = paragraph(
    "Models of the Hub are put in the cache of Hugging Face, which is the folder hub in the folder that the variable "
    "HF_HOME names, or else in ~/.cache/huggingface. Toy models and examples are put in the folder that the variable "
    "TUNE_SPARSE_CACHE names, or else in ~/.cache/tune-sparse. Another machine needs copies of both. Files that are "
    "there already are kept. No weights are pruned: the sweep does that."
)


def declare(commands: Any) -> None:
    prepare = add_command(
        commands,
        "prepare",
        _prepare,
        "download the models and examples of a sweep and train its toy models, so that the sweep needs no network",
        examples=("prepare", "prepare matrix --data-dir hub", "prepare --models tiny-llama"),
        ok="everything is on this machine",
        fault="the disk is full",
        bad="an option, a name or a file is wrong, or a download failed; what came before it is kept",
        notes=[words("example"), PLACES, models(trains=True, downloads=True), tasks(), presets()],
    )
    add_sweep_options(prepare, {"what to prepare": ("models", "tasks", "data_dir")}, texts=TEXTS)


def _prepare(chosen: argparse.Namespace) -> int:
    config = sweep_config(chosen)
    from tune_sparse.data.sources import fetch_examples
    from tune_sparse.models.checkpoints import prepare_models

    if config.data_dir == HUB:
        fetch_examples(config.tasks, report=print)
    for reference, folder in prepare_models(config.models, report=print).items():
        print(f"{reference}: {folder}")
    return OK
