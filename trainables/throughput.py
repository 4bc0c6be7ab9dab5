"""How fast a cell trains, by batch size: a few steps of each, nothing of them kept."""

from __future__ import annotations

import gc
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from trainables.budgets import run_budgets
from trainables.finetuning import setup
from trainables.peak_memory import PeakMemory
from trainables.training import WARM_UP_STEPS, Training
from trainables.worker import WorkerCache
from tune_sparse.data.batching import example_tokens
from tune_sparse.errors import TooLargeError
from tune_sparse.ledger.run import Run
from tune_sparse.lora.masked_linear import keep_for_steps
from tune_sparse.training.loop import accelerator_for, fit

TIMED_STEPS = 5


@dataclass(frozen=True)
class Throughput:
    """Rates and memory at one batch size; None where the memory did not suffice."""

    batch_size: int
    train_examples_per_second: float | None
    train_tokens_per_second: float | None
    peak_memory_bytes: int | None
    compiler_estimate_examples_per_second: float | None = None
    """what the compiler of a CS-3 expects: no measurement, and 10 to 25% off by its own word"""
    problem: str | None = None
    """why there is no rate, if it is not the memory"""

    @classmethod
    def of(cls, batch_size: int, training: Training, peak: int | None, estimate: float | None = None) -> Throughput:
        """Make one of a training's rates and the bytes of its peak."""
        rates = training.rates()
        examples, tokens = rates["train_examples_per_second"], rates["train_tokens_per_second"]
        return cls(batch_size, examples, tokens, peak, estimate)


def timed_run(run: Run, batch_size: int) -> Run:
    """Return `run` with `TIMED_STEPS` steps of `batch_size` examples after the warm-up steps."""
    steps = WARM_UP_STEPS + TIMED_STEPS
    protocol = replace(run.protocol, global_batch_size=batch_size, steps=steps, warmup_steps=0)
    return replace(run, protocol=protocol)


def measure(run: Run, worker: WorkerCache, batch_size: int) -> Throughput:
    """Train `TIMED_STEPS` steps of `batch_size` examples after the warm-up steps on this machine, as `run` would."""
    run = timed_run(run, batch_size)
    protocol = run.protocol
    torch.set_num_threads(protocol.threads)
    loaded = worker.model(run)
    try:
        budgets = run_budgets(run, loaded.dims)
    except TooLargeError as error:
        return Throughput(batch_size, None, None, None, problem=str(error))
    examples = worker.examples(run, loaded)
    masks = worker.pruner.make_into(run, loaded, examples.train)
    trainable = setup(run.cell.mode, loaded.model, protocol, masks, run.draw_seed)
    together = replace(budgets, micro_batch_tokens=batch_size * max(map(example_tokens, examples.train)))
    accelerator, totals = accelerator_for(trainable.mixed_precision), Training()
    gc.collect()
    try:
        with trainable.shrunk(), closing(PeakMemory()) as memory:
            optimizer, seed = trainable.optimizer(protocol), run.draw_seed
            if together.keeps_effective_weights:
                keep_for_steps(trainable.model, optimizer)
            hooks = trainable.hooks(optimizer)
            for step in fit(
                trainable.model, optimizer, examples.train, protocol, seed, 0, accelerator, hooks, together
            ):
                totals.add(step, cold=step.step <= WARM_UP_STEPS)
            memory.end("train")
    except (torch.OutOfMemoryError, MemoryError):
        worker.clear()
        return Throughput(batch_size, None, None, None)
    trainable.unwrap()
    return Throughput.of(batch_size, totals, memory.bytes)
