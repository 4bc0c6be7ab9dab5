"""Budgets as a user may set them: they bound memory, and are no part of a run's identity."""

from __future__ import annotations

from dataclasses import dataclass

from tune_sparse.config.options import option, rule
from tune_sparse.errors import unknown_name

TOKEN_BUDGETS = ("micro_batch_tokens", "scoring_tokens", "generation_tokens")
"""The budgets that divide work: another number adds up in another order."""
AUTO, ALWAYS, NEVER = "auto", "always", "never"
CHECKPOINTING = {
    AUTO: "where memory needs it",
    ALWAYS: "computes activations again in the backward pass, which takes time and saves memory",
    NEVER: "keeps all activations",
}


@dataclass(frozen=True)
class BudgetOptions:
    """What a user sets of the budgets. The rest follows from the device."""

    micro_batch_tokens: int | None = option(
        "largest number of tokens, padding included, in one forward pass of training. Steps have the same examples "
        "whatever it is",
        None,
        metavar="TOKENS",
        unset="from the memory of the GPU; 2048 on a CPU",
    )
    scoring_tokens: int | None = option(
        "largest number of tokens, padding included, in one forward pass of scoring",
        None,
        metavar="TOKENS",
        unset="from the memory of the GPU; 8192 on a CPU",
    )
    generation_tokens: int | None = option(
        "largest number of tokens, of prompts and answers together, that are generated at the same time",
        None,
        metavar="TOKENS",
        unset="from the memory of the GPU; 8192 on a CPU",
    )
    activation_checkpointing: str = option("activation checkpointing", AUTO, metavar="WHEN", choices=CHECKPOINTING)

    def __post_init__(self) -> None:
        for name in TOKEN_BUDGETS:
            value = getattr(self, name)
            rule(value is None or value >= 2, f"{name} must be at least 2 or none", value, "Give a larger number.")
        if self.activation_checkpointing not in CHECKPOINTING:
            raise unknown_name("activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
