"""Statistics of a set of masks: counts by matrix, and the magnitudes of the weights that went and stayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_sparse.models.float_bits import BITS, CHUNK, view_bits
from tune_sparse.pruning.prune_model import PrunedMatrix
from tune_sparse.pruning.survival_map import MAX_LEVELS

EXPONENTS = 256
"""Values of the exponent of a float32: the bins of the histogram are powers of two."""
EXPONENT_BIAS = {torch.bfloat16: 127, torch.float32: 127, torch.float16: 15}


@dataclass
class LevelStatistics:
    """Counts of one level, summed matrix by matrix."""

    method: str
    sparsity: float
    kept_by_matrix: dict[str, list[int]] = field(default_factory=dict)
    """{matrix: [weights kept, weights]}"""
    pruned: Tensor = field(default_factory=lambda: torch.zeros(EXPONENTS, dtype=torch.int64))
    """Weights that went, by the exponent of their magnitude: bin e holds 2^(e-127) <= |w| < 2^(e-126)."""
    kept: Tensor = field(default_factory=lambda: torch.zeros(EXPONENTS, dtype=torch.int64))

    def add(self, name: str, pruned: Tensor, kept: Tensor) -> None:
        """pruned, kept: (EXPONENTS,) of one matrix."""
        self.pruned += pruned
        self.kept += kept
        self.kept_by_matrix[name] = [int(kept.sum()), int(kept.sum() + pruned.sum())]

    def as_json(self) -> dict[str, Any]:
        kept, total = (sum(counts[i] for counts in self.kept_by_matrix.values()) for i in (0, 1))
        return {
            "method": self.method,
            "sparsity": self.sparsity,
            "actual_sparsity": 1 - kept / total,
            "kept": kept,
            "weights": total,
            "empty_matrices": [name for name, (kept, _) in self.kept_by_matrix.items() if not kept],
            "kept_by_matrix": self.kept_by_matrix,
        }

    def draw(self, path: Path) -> None:
        """A histogram of log2 |w|, the weights that stayed upon those that went."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        filled = (self.pruned + self.kept).nonzero().flatten().tolist()
        shown = range(max(1, filled[0]), filled[-1] + 1)
        exponents = [bin - EXPONENT_BIAS[torch.float32] for bin in shown]
        pruned, kept = (counts[list(shown)].tolist() for counts in (self.pruned, self.kept))
        axes.bar(exponents, pruned, 1.0, align="edge", label="pruned", color="#bbbbbb")
        axes.bar(exponents, kept, 1.0, align="edge", bottom=pruned, label="kept", color="#3366aa")
        axes.set(xlabel="log2 |w|", ylabel="weights", title=f"{self.method}, sparsity {self.sparsity:g}")
        axes.legend()
        figure.savefig(path, dpi=100)


def add_matrix(levels: Sequence[LevelStatistics], matrix: PrunedMatrix) -> None:
    """Count one matrix at every level, in place."""
    dense = matrix.dense()
    if matrix.levels is not None:
        joint = by_exponent(dense, matrix.levels)
        for number, level in enumerate(levels):
            level.add(matrix.name, joint[:, : number + 1].sum(dim=1), joint[:, number + 1 :].sum(dim=1))
        return
    for number, level in enumerate(levels):
        joint = by_exponent(dense, matrix.keep(number).view(torch.uint8))
        level.add(matrix.name, joint[:, 0], joint[:, 1])


def by_exponent(weight: Tensor, survived: Tensor) -> Tensor:
    """Count weights by exponent and by the levels that they survive: (EXPONENTS, MAX_LEVELS + 1)."""
    width = MAX_LEVELS + 1
    counts = torch.zeros(EXPONENTS * width, dtype=torch.int64)
    _, magnitude, infinite = BITS[weight.dtype]
    shift = (infinite & -infinite).bit_length() - 1  # bits of the mantissa
    for bits, levels in zip(view_bits(weight).split(CHUNK), survived.view(-1).split(CHUNK), strict=True):
        index = ((bits & magnitude) >> shift).to(torch.int16).mul_(width).add_(levels.to(torch.int16))
        counts += torch.bincount(index, minlength=EXPONENTS * width)
    rebased = EXPONENT_BIAS[torch.float32] - EXPONENT_BIAS[weight.dtype]
    return counts.view(EXPONENTS, width).roll(rebased, dims=0)
