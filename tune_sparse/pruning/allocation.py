"""Allocation: the number of weights that each matrix loses at each level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.models.architectures import Matrix
from tune_sparse.pruning.masks import pruned_count
from tune_sparse.pruning.survival_map import bin_counts, join_pattern, lower_counts, tie_counts

Counts = dict[str, list[int]]
"""{matrix: weights pruned at each level}"""

OUTLIER_FACTOR = 5.0
"""OWL's M: a score is an outlier above M times the mean of its block."""
OWL_SPREAD = 0.08
"""OWL's lambda: half the range that the layers' sparsities span."""


def uniform(sizes: Mapping[str, int], sparsities: Sequence[float]) -> Counts:
    """The same fraction of every matrix. sizes: {matrix: weights}."""
    return {name: [pruned_count(size, sparsity) for sparsity in sparsities] for name, size in sizes.items()}


def global_order(sizes: Mapping[str, int], sparsities: Sequence[float], scores: Callable[[str], Tensor]) -> Counts:
    """The lowest scores of the whole model. scores: as `lowest_of_all`.

    Raises `InputError` where a matrix would lose everything.
    """
    totals = [pruned_count(sum(sizes.values()), sparsity) for sparsity in sparsities]
    counts = lowest_of_all(sizes, totals, scores)
    for name, size in sizes.items():
        for sparsity, pruned in zip(sparsities, counts[name], strict=True):
            check_not_empty(name, size, pruned, sparsity)
    return counts


def lowest_of_all(sizes: Mapping[str, int], totals: Sequence[int], scores: Callable[[str], Tensor]) -> Counts:
    """How many of the `totals` lowest scores are in each matrix, in the strict order (score, matrix in the order of
    `sizes`, position).

    scores(name) is called three times for each matrix, so that no two need be in memory.
    """
    upper = sum((bin_counts(scores(name)) for name in sizes), start=torch.zeros(()))
    bins = [_bin_of_rank(upper, total) for total in totals]
    lower: dict[int, Tensor] = {}
    for name in sizes:
        values = scores(name)
        for bin in {bin for bin, _ in bins}:
            lower[bin] = lower.get(bin, 0) + lower_counts(values, bin)
    cuts = []
    for bin, rank in bins:
        value, ties = _bin_of_rank(lower[bin], rank)
        cuts.append((join_pattern(bin, value, values.dtype), ties))
    counts: Counts = {}
    left = [ties for _, ties in cuts]
    for name in sizes:
        values = scores(name)
        counts[name] = []
        for level, (pattern, _) in enumerate(cuts):
            below, equal = tie_counts(values, pattern)
            taken = min(equal, left[level])
            left[level] -= taken
            counts[name].append(below + taken)
    return counts


def _bin_of_rank(histogram: Tensor, rank: int) -> tuple[int, int]:
    """(bin that holds the score of this rank, how many of that bin come before it)."""
    upto = histogram.cumsum(0)
    bin = int(torch.searchsorted(upto, rank, right=True))
    return bin, rank - int(upto[bin] - histogram[bin])


def check_not_empty(name: str, size: int, pruned: int, sparsity: float) -> None:
    if pruned >= size:
        raise InputError(
            f"no layer may be 100% sparse: at sparsity {sparsity:g} {name} would lose all its {size} weights. "
            "Lower the sparsity or allocate uniformly."
        )


def owl(
    matrices: Sequence[Matrix], sizes: Mapping[str, int], sparsities: Sequence[float], outliers: Sequence[float]
) -> Counts:
    """Blocks with many outliers keep more (Yin et al. 2024, arXiv:2310.05175, section 3.3).

    outliers: fraction of outliers of each block. The sparsities of the blocks span twice the spread around the
    target, less near 0 and 1, where the published spread would leave [0, 1).
    """
    fractions = torch.tensor(outliers, dtype=torch.float64)
    span = fractions.max() - fractions.min()
    relative = (fractions - fractions.min()) / span if span > 0 else torch.zeros_like(fractions)
    denser = (2 * (relative - relative.mean())).tolist()
    return {
        matrix.name: [
            pruned_count(sizes[matrix.name], sparsity - _spread(sparsity) * denser[matrix.block])
            for sparsity in sparsities
        ]
        for matrix in matrices
    }


def _spread(sparsity: float) -> float:
    return min(OWL_SPREAD, sparsity / 2, (1 - sparsity) / 2)


def erk(shapes: Mapping[str, Sequence[int]], sparsities: Sequence[float]) -> Counts:
    """Each matrix keeps epsilon (n_in + n_out) weights, or all that it has (Evci et al. 2020, arXiv:1911.11134, section
    3), epsilon such that the total is exact.

    shapes: {matrix: (rows, columns)}. Counts are rounded as by Webster's method, so that they never fall with rising
    sparsity. Raises `InputError` where a matrix would lose everything.
    """
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    counts: Counts = {name: [] for name in shapes}
    for sparsity in sparsities:
        total = sum(sizes.values())
        kept = _kept_by_sides(shapes, total - pruned_count(total, sparsity))
        for name, size in sizes.items():
            counts[name].append(size - kept[name])
            check_not_empty(name, size, size - kept[name], sparsity)
    return counts


def _kept_by_sides(shapes: Mapping[str, Sequence[int]], total: int) -> dict[str, int]:
    """Weights that each matrix keeps of `total`, in proportion to its rows and columns together; where the last ones
    tie, the earlier matrix keeps one."""

    def kept(epsilon: float) -> dict[str, int]:
        return {
            name: min(rows * columns, math.floor(epsilon * (rows + columns) + 0.5))
            for name, (rows, columns) in shapes.items()
        }

    low, high = 0.0, 1.0 + max(min(shape) for shape in shapes.values())
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sum(kept(middle).values()) <= total else (low, middle)
    found, above = kept(low), kept(high)
    for name in found:
        if found[name] < above[name] and sum(found.values()) < total:
            found[name] += 1
    return found


def outlier_fraction(scores: Callable[[], Iterable[Tensor]]) -> float:
    """Share of a block's Wanda scores above `OUTLIER_FACTOR` times their mean. scores() gives them twice, (O, I)."""
    total, summed = 0, 0.0
    for score in scores():
        total += score.numel()
        summed += float(score.sum(dtype=torch.float64))
    return sum(int((score > OUTLIER_FACTOR * summed / total).sum()) for score in scores()) / total
