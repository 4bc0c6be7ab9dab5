"""A cell: one point of the matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tune_sparse.config.options import rule
from tune_sparse.modes import MODES, dense_mode
from tune_sparse.schedules import ONE_SHOT


def check_sparsities(sparsities: Iterable[float]) -> None:
    """Raise `InputError` unless all are fractions."""
    for sparsity in sparsities:
        rule(
            0 <= sparsity < 1,
            "a sparsity is the fraction of zeros, in [0, 1)",
            sparsity,
            f"Did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else "Give a fraction.",
        )


@dataclass(frozen=True)
class Cell:
    """One point of the matrix."""

    model: str
    task: str
    method: str
    sparsity: float
    mode: str
    seed: int
    backend: str
    schedule: str = ONE_SHOT

    @property
    def trained_by(self) -> str:
        """The mode, and the schedule where masks change."""
        return self.mode if self.schedule == ONE_SHOT else f"{self.mode}-{self.schedule}"

    @property
    def trained(self) -> Cell:
        """The cell whose training serves this one: without zeros, every method and LoRA mode is one dense baseline."""
        if self.sparsity > 0 and MODES[self.mode].is_pruned:
            return self
        return Cell(self.model, self.task, "none", 0.0, dense_mode(self.mode), self.seed, self.backend)
