"""A ledger of runs whose masks changed while they trained, recorded without a training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from factories import CELL, done_record, make_run, make_sweep, write_run
from torch import Tensor

from trainables.dynamics import Dynamics
from tune_sparse.config import Cell, Protocol, ScheduleSettings
from tune_sparse.files import write_lines
from tune_sparse.ledger.dynamics import append_dynamics
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.masks import keep_highest
from tune_sparse.schedules import SCHEDULES, Update

SHAPES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
NAMES = {f"model.layers.{block}.{layer}.weight": SHAPES[layer] for block in range(2) for layer in SHAPES}
STEPS = 200
SETTINGS = ScheduleSettings(update_every=25, dynamics_every=20, effective_rank_side=64)
RUN_CHANGES: dict[str, Any] = {"protocol": Protocol(steps=STEPS), "schedule_settings": SETTINGS}


def ledger_of_changing_masks(
    folder: Path,
    schedules: tuple[str, ...] = ("one-shot", "gradual", "rigl"),
    sparsities: tuple[float, ...] = (0.5, 0.9),
    seeds: tuple[int, ...] = (0,),
) -> Ledger:
    """Runs of masked-finetuning, each with the records of masks that its schedule changed at random."""
    ledger, fixed = Ledger(folder), {"mode": "masked-finetuning"}
    cells = [
        Cell(**CELL | fixed | {"schedule": schedule, "sparsity": sparsity, "seed": seed})
        for schedule, sparsity, seed in itertools.product(schedules, sparsities, seeds)
    ]
    for cell in cells:
        run = make_run(cell.trained, **RUN_CHANGES)
        path = write_run(ledger, run, done_record(run, accuracy=0.9 - cell.sparsity / 4))
        curve = [{"step": step, "eval_loss": 1 / step**0.3 + cell.sparsity} for step in range(20, STEPS + 1, 20)]
        write_lines(path / "metrics.jsonl", curve)
        _record(run, path)
    ledger.write_sweep(make_sweep(cells, **RUN_CHANGES))
    return ledger


def _record(run: Run, folder: Path) -> None:
    updates = SCHEDULES[run.cell.schedule].plan(run.schedule_settings, run.cell.sparsity, STEPS)
    dynamics = Dynamics(run, updates, 10_000, lambda line: append_dynamics(folder, line))
    generator = torch.Generator().manual_seed(run.cell.seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}
    masks = _cut(weights, 0.0 if SCHEDULES[run.cell.schedule].starts_dense else run.cell.sparsity)
    by_step = {update.step: update for update in updates}
    for step in (step for step in range(STEPS + 1) if dynamics.is_due(step)):
        update = by_step.get(step)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        if step:
            dynamics.see_gradients(weights, masks)
        masks = _updated(update, masks, generator) if update else masks
        dynamics.record(step, update, masks, weights)


def _cut(scores: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    return {name: keep_highest(score.abs(), round(score.numel() * sparsity)) for name, score in scores.items()}


def _updated(update: Update, masks: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Masks of the update's sparsity: what it drops, and what is grown, is drawn."""

    def score(mask: Tensor) -> Tensor:
        stays, luck = torch.rand((2, *mask.shape), generator=generator)
        return mask * (stays > update.drop_fraction) + luck / 2

    return _cut({name: score(mask) for name, mask in masks.items()}, update.sparsity)
