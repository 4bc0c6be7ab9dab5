"""prepare: what a sweep needs, fetched or trained."""

from __future__ import annotations

import argparse
from typing import Any

from tune_sparse.cli.command import OK, add_command
from tune_sparse.cli.sweep_options import add_sweep_options, sweep_config
from tune_sparse.cli.words import models, presets, tasks, words
from tune_sparse.config import HUB


def declare(commands: Any) -> None:
    prepare = add_command(
        commands,
        "prepare",
        _prepare,
        "download the models and examples of a sweep and train its toy models, so that the sweep needs no network",
        examples=("prepare", "prepare matrix --data-dir hub", "prepare --models tiny-llama"),
        ok="everything is on this machine",
        fault="the disk is full",
        notes=[words("cell", "run", "example"), models(), tasks(), presets()],
    )
    add_sweep_options(prepare, {"what to prepare": ("models", "tasks", "data_dir")}, sets=False)


def _prepare(chosen: argparse.Namespace) -> int:
    config = sweep_config(chosen)
    from tune_sparse.data.sources import fetch_examples
    from tune_sparse.models.checkpoints import prepare_models

    if config.data_dir == HUB:
        fetch_examples(config.tasks, report=print)
    for reference, folder in prepare_models(config.models, report=print).items():
        print(f"{reference}: {folder}")
    return OK
