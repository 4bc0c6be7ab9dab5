"""The budgets of a run on the device of this process, and their check against its examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from trainables.hardware import gpu_memory_bytes, gpu_share
from trainables.loaded import Examples
from tune_sparse.config import Protocol
from tune_sparse.config.options import rule
from tune_sparse.data.batching import example_tokens
from tune_sparse.data.task_types import AnswerTask
from tune_sparse.evaluation.card_budgets import budgets_for, scoring_budgets
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.ledger.run import Run
from tune_sparse.models.dims import ModelDims
from tune_sparse.training.budgets import Budgets, cpu_budgets, fixed_micro_batch_tokens


def run_budgets(run: Run, dims: ModelDims) -> Budgets:
    """What the user set, and for the rest what suits the device. Raises `TooLargeError` for one that is too small."""
    card_bytes = gpu_memory_bytes()
    if card_bytes is not None:
        cell = CellMemory(dims, run.cell.mode, run.cell.method, run.protocol, run.cell.sparsity)
        return budgets_for(card_bytes, gpu_share(), cell, run.budgets)
    fitting = fitting_budgets(run.protocol, dims)
    fixed = fixed_micro_batch_tokens(run.protocol, run.budgets)
    return replace(fitting, micro_batch_tokens=fixed or fitting.micro_batch_tokens).changed_by(run.budgets)


def fitting_budgets(protocol: Protocol, dims: ModelDims) -> Budgets:
    """The budgets that suit the device of this process for a model that is only scored."""
    card_bytes = gpu_memory_bytes()
    if card_bytes is not None:
        return scoring_budgets(card_bytes, gpu_share(), dims, protocol)
    return cpu_budgets(protocol.within(dims.max_positions).max_tokens)


def check_budgets(budgets: Budgets, examples: Examples, max_new_tokens: int) -> None:
    """Raise `InputError` for a budget that a single example exceeds."""
    read, written = list(map(example_tokens, examples.selection)), []
    for test in examples.tests:
        encoded = [e for example in test.examples for e in example.encoded]
        if isinstance(test.task, AnswerTask):
            written += [len(e.context) + max_new_tokens for e in encoded]
        else:
            read += [example_tokens(e) - 1 for e in encoded]  # nothing follows the last token
    _check("micro_batch_tokens", budgets.micro_batch_tokens, map(example_tokens, examples.train))
    _check("scoring_tokens", budgets.scoring_tokens, read)
    _check("generation_tokens", budgets.generation_tokens, written)


def _check(name: str, budget: int, lengths: Iterable[int]) -> None:
    longest = max(lengths, default=0)
    rule(
        longest <= budget,
        f"{name} must hold the longest example, of {longest} tokens",
        budget,
        f"Raise --{name.replace('_', '-')}, or lower max_tokens.",
    )
