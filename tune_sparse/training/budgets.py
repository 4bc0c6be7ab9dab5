"""Budgets: how many tokens a device holds at once. They bound memory, and change only the order of additions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tune_sparse.config import BudgetOptions, Protocol
from tune_sparse.config.budgets import ALWAYS, AUTO, NEVER, TOKEN_BUDGETS


@dataclass(frozen=True)
class Budgets:
    """What a cell may hold at once. Recorded with a run, and no part of its identity."""

    micro_batch_tokens: int
    """of a training micro-batch, padding included"""
    scoring_tokens: int
    """of one pass without gradients, padding included"""
    generation_tokens: int
    """of the prompts and answers that are written at once: the key-value cache has room for them"""
    activation_checkpointing: bool
    """Training keeps one activation a decoder block, and computes the others again in the backward pass."""
    keeps_effective_weights: bool
    """W_eff of every masked layer is kept for an optimizer step, a second copy of the weights, else built again."""

    def changed_by(self, options: BudgetOptions) -> Budgets:
        """These budgets, but what a user set."""
        given: dict[str, Any] = {name: value for name in TOKEN_BUDGETS if (value := getattr(options, name)) is not None}
        if options.activation_checkpointing != AUTO:
            given["activation_checkpointing"] = options.activation_checkpointing == ALWAYS
        return replace(self, **given)

    def as_options(self) -> BudgetOptions:
        """The options that give these budgets on any device."""
        checkpointing = ALWAYS if self.activation_checkpointing else NEVER
        return BudgetOptions(self.micro_batch_tokens, self.scoring_tokens, self.generation_tokens, checkpointing)

    def as_record(self) -> dict[str, Any]:
        """Return plain values, for `measured["budgets"]` of a record."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Budgets:
        return cls(**record)


CPU_BUDGETS = Budgets(
    micro_batch_tokens=2048,
    scoring_tokens=8192,
    generation_tokens=8192,
    activation_checkpointing=False,
    keeps_effective_weights=False,
)
"""Fixed, so that bits repeat from one CPU to the next of its kind."""


def cpu_budgets(max_tokens: int) -> Budgets:
    """The budgets of a CPU, which hold at least one example of `max_tokens` tokens."""
    return replace(CPU_BUDGETS, **{name: max(getattr(CPU_BUDGETS, name), max_tokens) for name in TOKEN_BUDGETS})


def fixed_micro_batch_tokens(protocol: Protocol, options: BudgetOptions) -> int | None:
    """The tokens of a micro-batch where they are part of a run's identity, and None elsewhere.

    Dropout draws for each micro-batch, so that with it they are the same on every device.
    """
    if not protocol.lora_dropout:
        return None
    return options.micro_batch_tokens or max(CPU_BUDGETS.micro_batch_tokens, protocol.max_tokens)
