"""throughput: rates and memory by batch size."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from tune_sparse.cli.command import OK, add_command, add_json
from tune_sparse.cli.sweep_options import add_sweep_options, sweep_config
from tune_sparse.cli.words import (
    RUN_WORDS,
    files,
    methods,
    models,
    modes,
    paragraph,
    presets,
    settings,
    tasks,
    words,
)
from tune_sparse.config.protocol import CALIBRATION_SETTINGS
from tune_sparse.errors import InputError

BATCH_SIZES = [1, 2, 4, 8, 16]
GROUPS = {
    "what to measure": ("models", "tasks", "methods", "sparsities", "modes"),
    "data and settings": ("data_dir",),
    "memory": ("activation_checkpointing",),
    "results": ("results_dir",),
}
SETTINGS = (
    *("lora_rank", "lora_dropout", "masked_lora_impl", "train_on_prompt", "packing"),
    *("precision", "max_tokens", "n_train", "n_selection", "threads", *CALIBRATION_SETTINGS),
)
"""The settings that can change what is measured."""
TEXTS = {
    "n_selection": "number of examples that are taken out of train.jsonl where the selection examples come from it "
    "(default: 256)"
}
OPTION_TEXTS = {"tasks": "tasks to train on, listed below; TASK+TASK is a mixture (default: boolq hellaswag gsm8k)"}


def declare(commands: Any) -> None:
    throughput = add_command(
        commands,
        "throughput",
        _throughput,
        "measure examples and tokens per second, and peak memory, of training at several batch sizes",
        examples=("throughput --models tiny-llama --tasks boolq --sparsities 0.5 --batch-sizes 1 4 16",),
        ok="everything is measured, or was found not to fit into memory",
        fault="the disk is full",
        notes=[
            words(*RUN_WORDS, "example", "adapter", "calibration", "results folder"),
            paragraph(
                "The training of each combination of model, task, method, sparsity and mode is measured, one "
                "combination after the other: 5 training steps, after 2 that are not counted. Where there is a GPU, "
                "the model is trained there and the memory is that of the GPU, otherwise that of the process. A batch "
                "size that does not fit into the memory of the GPU is printed as `out of memory` and stored with null "
                "for its numbers, and the next one is tried; a process that is too large for the memory of the machine "
                "may be killed. Nothing is scored. The numbers are printed and stored in RESULTS/throughput."
            ),
            models(trains=True, downloads=True),
            tasks(),
            files(),
            methods(),
            modes(),
            presets(),
            settings(SETTINGS, texts=TEXTS),
        ],
    )
    groups = add_sweep_options(throughput, GROUPS, "settings that matter here, listed below", OPTION_TEXTS)
    groups["what to measure"].add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=BATCH_SIZES,
        metavar="N",
        help=f"numbers of examples in a training step, all in one forward pass; each is measured, in place of the "
        f"setting global_batch_size (default: {' '.join(map(str, BATCH_SIZES))})",
    )
    add_json(groups["results"], "the measurements")


def _throughput(chosen: argparse.Namespace) -> int:
    config, sizes = sweep_config(chosen), chosen.batch_sizes
    if min(sizes) < 1:
        raise InputError(f"a batch size must be at least 1, got {min(sizes)}. Give larger numbers.")
    from trainables.hardware import environment
    from trainables.throughput import measure
    from trainables.worker import WorkerCache
    from tune_sparse.files import write_json
    from tune_sparse.models.checkpoints import prepare_models
    from tune_sparse.sweep.plan import make_plan

    prepare_models(config.models, report=print)
    plan, worker = make_plan(config), WorkerCache()
    folder = config.results_dir / "throughput"
    folder.mkdir(parents=True, exist_ok=True)
    if not chosen.json:
        print(f"{'batch':>5}{'examples/s':>11}{'tokens/s':>11}{'peak GB':>9}")
    for run in plan.runs.values():
        measured = [measure(run, worker, size) for size in sizes]
        value = {"run_id": run.run_id, "by_batch_size": [asdict(m) for m in measured], "environment": environment()}
        write_json(folder / f"{run.run_id}.json", value)
        if chosen.json:
            print(json.dumps(value))
            continue
        print(run.run_id)
        for m in measured:
            rates = (m.train_examples_per_second, m.train_tokens_per_second, (m.peak_memory_bytes or 0) / 1e9)
            shown = "".join(f"{rate:{width}.1f}" for rate, width in zip(rates, (11, 11, 9), strict=True) if rate)
            print(f"{m.batch_size:5}{shown or '   out of memory'}")
    return OK
