"""The cost of a schedule, counted on the simulated device: operations, bytes that they read and write, waits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from factories import tiny_run
from simulated_device import simulated_device

from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.config import BudgetOptions, Protocol, ScheduleSettings
from tune_sparse.config.budgets import NEVER
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.schedules import SCHEDULES

STEPS, EXAMPLES = 5, 4
SETTINGS = ScheduleSettings(update_every=2, gradual_updates=2, update_from=0.0, update_to=0.8, dynamics_every=2)
"""Masks are recorded at every update, and at a step without one."""


@dataclass(frozen=True)
class StepCost:
    """Of one optimizer step, with what is done until the next one begins."""

    operations: Counter[str]
    bytes: int
    waits: int


def step_costs(model: Path, schedule: str, method: str = "unstructured") -> dict[int, StepCost]:
    """{step: its cost}, of steps without an eval loss but the first, before which the model is pruned."""
    protocol = {"steps": STEPS, "eval_every": STEPS, "global_batch_size": EXAMPLES, "max_tokens": 128, "n_test": 2}
    run = tiny_run(model, mode="masked-finetuning", schedule=schedule, method=method, precision="bfloat16", **protocol)
    run = replace(run, schedule_settings=SETTINGS, budgets=BudgetOptions(128, activation_checkpointing=NEVER))
    found: dict[int, StepCost] = {}
    with TemporaryDirectory() as folder, simulated_device() as activity:
        before = StepCost(Counter(), 0, 0)
        for step in run_cell(run, Ledger(Path(folder)), WorkerCache()):
            now = StepCost(Counter(activity.launches), activity.moved_bytes, activity.waited)
            if step is not None and 1 < step.step < STEPS:
                operations = now.operations - before.operations
                found[step.step] = StepCost(operations, now.bytes - before.bytes, now.waits - before.waits)
            before = now
    return found


def default_interval(schedule: str) -> float:
    """Steps from one update to the next in the default protocol."""
    steps = [update.step for update in SCHEDULES[schedule].plan(ScheduleSettings(), 0.5, Protocol().steps)]
    if len(steps) < 2:  # set and rigl have one update in so short a training
        return float(ScheduleSettings().update_every)
    return (steps[-1] - steps[0]) / (len(steps) - 1)


def interval_share(schedule: str, plain: StepCost, with_update: StepCost) -> tuple[float, float]:
    """(operations, bytes) of an update as fractions of those of the steps between two updates, at the default batch.

    More examples are more micro-batches of the same size, and one step of the optimizer all the same: so a quarter of
    the ratio is used.
    """
    steps = default_interval(schedule) * Protocol().global_batch_size / EXAMPLES / 4
    operations = with_update.operations.total() - plain.operations.total()
    return operations / (steps * plain.operations.total()), (with_update.bytes - plain.bytes) / (steps * plain.bytes)
