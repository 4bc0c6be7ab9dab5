"""The training of one run: steps, eval losses, totals, and a checkpoint from which a killed one goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from trainables.dynamics import recorded
from trainables.loaded import Examples
from trainables.mode import TrainableModel
from trainables.run_log import RunLog
from trainables.super_adapter import SampledSlices
from tune_sparse.ledger.run import Run
from tune_sparse.lora.masked_linear import keep_for_steps
from tune_sparse.training.budgets import Budgets
from tune_sparse.training.checkpoint import BrokenStateError, restore_into, save_training
from tune_sparse.training.loop import Step, StepHooks, accelerator_for, fit, mean_loss

CHECKPOINT_SECONDS = 300.0
"""A killed training loses at most so much of its work, and one that is shorter never writes a checkpoint."""
WARM_UP_STEPS = 2
"""The first steps allocate memory, choose kernels and fill caches: they are not in the rates."""


@dataclass
class Training:
    """Totals of a training, filled as it goes."""

    steps: int = 0
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    cold_seconds: float = 0.0
    cold_examples: int = 0
    cold_tokens: int = 0
    """of the first `WARM_UP_STEPS` of this process"""
    last_loss: float = math.nan
    summary: dict[str, float] = field(default_factory=dict)
    """of what its steps did besides"""
    best_eval_loss: float = math.inf
    seconds_to_best_eval_loss: float | None = None
    budgets: Budgets | None = None
    """that it used here; None where it ran elsewhere"""
    appliance: dict[str, float | int | str | None] = field(default_factory=dict)
    """of a training on Cerebras: its padding and annotation; of one on a CS-3 also the compiles, and seconds in the
    queue, of compiling and of programming, which `seconds` leaves out"""

    def add(self, step: Step, cold: bool) -> None:
        self.steps = step.step
        self.seconds += step.seconds
        self.examples += step.examples
        self.tokens += step.tokens
        if cold:
            self.cold_seconds += step.seconds
            self.cold_examples += step.examples
            self.cold_tokens += step.tokens
        self.last_loss = step.loss

    def add_eval(self, loss: float) -> None:
        if loss < self.best_eval_loss:
            self.best_eval_loss, self.seconds_to_best_eval_loss = loss, self.seconds

    def rates(self) -> dict[str, float | None]:
        """Training examples and tokens per second, warm-up steps left out; None if there was no other step."""
        warm = self.seconds - self.cold_seconds
        examples, tokens = self.examples - self.cold_examples, self.tokens - self.cold_tokens
        return {
            "train_examples_per_second": examples / warm if examples else None,
            "train_tokens_per_second": tokens / warm if examples else None,
        }


def train(
    run: Run,
    trainable: TrainableModel,
    examples: Examples,
    budgets: Budgets,
    checkpoint: Path,
    log: RunLog,
) -> Generator[Step, None, Training]:
    """Train in place, with an eval loss every `eval_every` steps and at the end.

    It goes on from `checkpoint` if that is one of this run; one that cannot be read whole is left alone, with a line
    in the log, and the training begins anew. Micro-batches stay as they began, unless `budgets` has no room for them.
    """
    protocol, optimizer = run.protocol, trainable.optimizer(run.protocol)
    steps = SampledSlices.from_run(run, trainable) or trainable.hooks(optimizer)
    hooks = recorded(steps, run, trainable, log.dynamics)
    training, lines = _resume_into(run, trainable, optimizer, hooks, budgets, checkpoint, log)
    budgets = training.budgets or budgets
    if budgets.keeps_effective_weights:
        keep_for_steps(trainable.model, optimizer)

    def note(**values: float | int) -> None:
        lines.append(values)
        log.metrics(**values)

    saved, first = time.monotonic(), training.steps
    accelerator = accelerator_for(trainable.mixed_precision)
    for step in fit(
        trainable.model, optimizer, examples.train, protocol, run.draw_seed, first, accelerator, hooks, budgets
    ):
        training.add(step, cold=step.step - first <= WARM_UP_STEPS)
        note(step=step.step, train_loss=step.loss, learning_rate=step.learning_rate)
        if step.step % protocol.eval_every == 0 or step.step == protocol.steps:
            loss = mean_loss(trainable.model, examples.selection, protocol, accelerator, budgets)
            training.add_eval(loss)
            note(step=step.step, eval_loss=loss)
            log(f"step {step.step} of {protocol.steps}: train loss {step.loss:.4f}, eval loss {loss:.4f}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS and step.step < protocol.steps:
            so_far = {"training": asdict(training), "lines": json.dumps(lines), "hooks": hooks.state()}
            save_training(checkpoint, run.identity, trainable.parameters(), optimizer, so_far)
            saved = time.monotonic()
        yield step
    training.summary = hooks.summary()
    return training


def _resume_into(
    run: Run,
    trainable: TrainableModel,
    optimizer: Optimizer,
    hooks: StepHooks,
    budgets: Budgets,
    checkpoint: Path,
    log: RunLog,
) -> tuple[Training, list[dict[str, Any]]]:
    """Put a checkpoint of the run into its model and optimizer, and return its totals and lines; else empty ones."""
    try:
        so_far = restore_into(checkpoint, run.identity, trainable.parameters(), optimizer)
    except BrokenStateError as error:
        so_far = None
        log(f"begins anew: {error}")
    if so_far is None:
        return Training(budgets=budgets), []
    begun_with = Budgets.from_record(so_far["training"].pop("budgets"))
    if state := so_far.get("hooks"):
        hooks.restore(state)
    training, lines = Training(**so_far["training"]), json.loads(so_far["lines"])
    for line in lines:
        log.metrics(**line)
    log(f"goes on after step {training.steps} of a training that was cut short")
    training.budgets = _going_on(begun_with, budgets, log)
    return training, lines


def _going_on(begun_with: Budgets, budgets: Budgets, log: RunLog) -> Budgets:
    """The budgets with which a training goes on: its first micro-batches, where they fit here."""
    if begun_with.micro_batch_tokens <= budgets.micro_batch_tokens:
        return replace(budgets, micro_batch_tokens=begun_with.micro_batch_tokens)
    log(
        f"goes on with micro-batches of {budgets.micro_batch_tokens} tokens where it began with "
        f"{begun_with.micro_batch_tokens}: the last bits of its numbers will differ"
    )
    return budgets
