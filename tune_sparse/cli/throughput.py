"""throughput: rates and memory by batch size."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from tune_sparse.cli.command import OK, add_command, add_json
from tune_sparse.cli.sweep_options import add_sweep_options, sweep_config
from tune_sparse.cli.words import methods, models, modes, paragraph, presets, settings, tasks, words
from tune_sparse.errors import InputError

BATCH_SIZES = [1, 2, 4, 8, 16]
GROUPS = {
    "what to measure": ("models", "tasks", "methods", "sparsities", "modes"),
    "data and settings": ("data_dir",),
    "results": ("results_dir",),
}


def declare(commands: Any) -> None:
    throughput = add_command(
        commands,
        "throughput",
        _throughput,
        "measure the speed of training and its peak memory at several batch sizes",
        examples=("throughput --models tiny-llama --tasks boolq --sparsities 0.5 --batch-sizes 1 4 16",),
        ok="everything is measured",
        fault="the disk is full",
        notes=[
            words("cell", "run", "example", "adapter", "calibration", "results folder"),
            paragraph(
                "Every run of the chosen models, tasks, methods, sparsities and modes is measured one after the "
                "other, on the GPU if there is one, for a few training steps. The numbers are printed and stored "
                "in DIR/throughput."
            ),
            models(),
            tasks(),
            methods(),
            modes(),
            presets(),
            settings(),
        ],
    )
    groups = add_sweep_options(throughput, GROUPS)
    groups["what to measure"].add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=BATCH_SIZES,
        metavar="N",
        help=f"numbers of examples in a forward pass; each is measured (default: {' '.join(map(str, BATCH_SIZES))})",
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
