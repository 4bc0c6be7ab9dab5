"""One trial of a search over trainings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tune_sparse.search.tuning_space import Point


@dataclass(frozen=True)
class Trial:
    """Settings that the sampler suggested, the run that they are, and what the sampler was told."""

    number: int
    point: Point
    completed_before: int
    """How many trials had results when the sampler made this one."""
    completed_at: int | None = None
    """It was the completed_at-th to have a result, from 0; None while it is open."""
    state: str | None = None
    """done, stopped (early) or failed"""
    run_id: str | None = None
    """None for settings that do not go together"""
    values: dict[str, float] | None = None
    """{objective: value}, of one that is done"""
    stopped: dict[str, Any] | None = None
    """step and value at the last rung of one that was stopped"""
    error: str | None = None
