"""What a mode makes of trained adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Deployed:
    """trained: weights (O, I) by name that compute exactly the trained function. final: those that are deployed,
    where a last mask changes them."""

    trained: dict[str, Tensor]
    final: dict[str, Tensor] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
