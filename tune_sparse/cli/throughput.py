"""throughput: rates and memory by batch size."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from trainables.throughput import Throughput

BATCH_SIZES = [1, 2, 4, 8, 16]
GROUPS = {
    "what to measure": ("models", "tasks", "methods", "sparsities", "modes", "backend"),
    "data and settings": ("data_dir",),
    "memory": ("activation_checkpointing",),
    "results": ("results_dir",),
    "Cerebras CS-3, for --backend cerebras": (
        *("cerebras_target", "num_csx", "mount_dirs", "python_paths", "num_workers_per_csx", "automount"),
        *("job_priority", "compile_dir", "csx_micro_batch_size", "disable_version_check", "train_timeout_seconds"),
    ),
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
            words("cell", *RUN_WORDS, "example", "adapter", "calibration", "backend", "CS-3", "results folder"),
            paragraph(
                "The training of each combination of model, task, method, sparsity and mode is measured, one "
                "combination after the other: 5 training steps, after 2 that are not counted. Where there is a GPU, "
                "the model is trained there and the memory is that of the GPU, otherwise that of the process. A batch "
                "size that does not fit into the memory of the GPU is printed as `out of memory` and stored with null "
                "for its numbers, and the next one is tried; a process that is too large for the memory of the machine "
                "may be killed. Nothing is scored. The numbers are printed and stored in RESULTS/throughput."
            ),
            paragraph(
                "With --backend cerebras the steps are trained with the Cerebras software on the target that was asked "
                "for, never elsewhere: waiting in the queue, compiling and programming are left out of the rates. The "
                "column `estimate` is what the compiler expects, in examples per second; it is no measurement, and by "
                "its own word 10 to 25% off."
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
    groups["Cerebras CS-3, for --backend cerebras"].add_argument(
        "--compile-only",
        action="store_true",
        help="train nothing: compile each batch size, which needs no free CS-3 system, and show the estimate of the "
        "compiler; only with --cerebras-target csx (default: train)",
    )
    add_json(groups["results"], "the measurements")


def _throughput(chosen: argparse.Namespace) -> int:
    config, sizes = sweep_config(chosen), chosen.batch_sizes
    if min(sizes) < 1:
        raise InputError(f"a batch size must be at least 1, got {min(sizes)}. Give larger numbers.")
    from trainables.process import prepare_process

    prepare_process(config.deterministic)
    from trainables.cerebras_throughput import check_measurable, measure_on_cerebras
    from trainables.hardware import environment
    from trainables.throughput import measure
    from trainables.worker import WorkerCache
    from tune_sparse.files import write_json
    from tune_sparse.models.checkpoints import prepare_models
    from tune_sparse.sweep.plan import make_plan

    if chosen.compile_only and config.backends != ("cerebras",):
        raise InputError("only the backend cerebras compiles, --compile-only needs --backend cerebras. Add it.")
    if "cerebras" in config.backends:
        check_measurable(config.cerebras, chosen.compile_only)
    prepare_models(config.models, report=print)
    plan, worker = make_plan(config), WorkerCache()
    folder = config.results_dir / "throughput"
    folder.mkdir(parents=True, exist_ok=True)
    if not chosen.json:
        print(HEADER)
    for run in plan.runs.values():
        if run.cerebras is None:
            measured = [measure(run, worker, size) for size in sizes]
        else:
            there = partial(measure_on_cerebras, compile_only=chosen.compile_only)
            measured = [there(run, worker, size, config.cerebras, config.results_dir) for size in sizes]
        value = {
            "run_id": run.run_id,
            "measured_on": {"backend": run.cell.backend, **(run.cerebras or {})},
            "by_batch_size": [asdict(m) for m in measured],
            "environment": environment(),
        }
        write_json(folder / f"{run.run_id}.json", value)
        print(json.dumps(value) if chosen.json else "\n".join([run.run_id, *map(_line, measured)]))
    return OK


HEADER = f"{'batch':>5}{'examples/s':>11}{'tokens/s':>11}{'peak GB':>9}{'estimate':>10}"


def _line(m: Throughput) -> str:
    """Format a batch size: its rates, or why there are none; the compiler's estimate has a column of its own."""
    peak = m.peak_memory_bytes / 1e9 if m.peak_memory_bytes is not None else None
    rates = (m.train_examples_per_second, m.train_tokens_per_second)
    values = (*rates, peak, m.compiler_estimate_examples_per_second)
    if all(value is None for value in values):
        return f"{m.batch_size:5}   {m.problem or 'out of memory'}"
    texts = ("-" if value is None else f"{value:.1f}" for value in values)
    return f"{m.batch_size:5}" + "".join(f"{text:>{width}}" for text, width in zip(texts, (11, 11, 9, 10), strict=True))
