"""Budgets: how many tokens a device holds at once. They bound memory, and change only the order of additions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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

    def as_record(self) -> dict[str, Any]:
        """Return plain values, for `measured["budgets"]` of a record and for checkpoints."""
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
