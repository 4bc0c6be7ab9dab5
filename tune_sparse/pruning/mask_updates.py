"""Masks that change while a model trains: the places of one matrix that an update cuts, drops and grows.

Places are taken in the strict order (score, position) of `tune_sparse.pruning.masks`, on every device. Masks are bool,
True where a weight is kept, and of the shape of their weight, as scores are: finite floats, compared by their absolute
values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tune_sparse.pruning.allocation import check_not_empty, erk, lowest_of_all, uniform
from tune_sparse.pruning.masks import pruned_count
from tune_sparse.pruning.seeded import seeded_uniform
from tune_sparse.pruning.survival_map import survival_map


@dataclass(frozen=True)
class Change:
    """The update of one mask."""

    survivors: Tensor
    """Kept before and after."""
    grown: Tensor
    """Kept after, from a weight of 0: some may have been dropped just now."""

    @property
    def keep(self) -> Tensor:
        """The mask after the update."""
        return self.survivors | self.grown


def lowest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores of the places `among`; on a tie the earlier positions."""
    marked = torch.zeros_like(among)
    marked[among] = survival_map(scores[among], [count]) == 0
    return marked


def highest(scores: Tensor, among: Tensor, count: int, places: int) -> Tensor:
    """Mark the `count` highest scores of the places `among`; on a tie the later positions. places: how many `among`
    are."""
    return among & ~lowest(scores, among, places - count)


def cut(scores: Tensor, keep: Tensor, kept: int, pruned: int) -> Change:
    """Prune the lowest scores of those that are kept until `pruned` of the matrix are. kept: how many are by now."""
    survivors = keep & ~lowest(scores, keep, pruned - (keep.numel() - kept))
    return Change(survivors, torch.zeros_like(keep))


def select(scores: Tensor, keep: Tensor, pruned: int) -> Change:
    """Choose anew, whatever is kept by now: all but the `pruned` lowest scores of the matrix."""
    chosen = survival_map(scores, [pruned]) > 0
    return Change(chosen & keep, chosen & ~keep)


def regrow(weight: Tensor, keep: Tensor, kept: int, dropped: int, growth: Tensor) -> Change:
    """Drop the smallest of the kept weights and grow as many of all that are not kept then, by the highest `growth`.

    SET, with random numbers (Mocanu et al. 2018, arXiv:1707.04780), or RigL, with dense gradients (Evci et al. 2020,
    arXiv:1911.11134). What was dropped may be grown, as there. kept: how many are.
    """
    survivors = keep & ~lowest(weight, keep, dropped)
    return Change(survivors, highest(growth, ~survivors, dropped, keep.numel() - kept + dropped))


def drop_count(size: int, kept: int, fraction: float) -> int:
    """The number of kept weights that an update drops: the fraction rounded; none of a matrix that has no zeros, which
    would grow them back and lose their values."""
    return round(fraction * kept) if kept < size else 0


def random_growth(weight: Tensor, seed: int, step: int, name: str) -> Tensor:
    """Scores by which SET grows: uniform in [0, 1), the same on every device and in any order of the matrices.

    The update's number and the matrix name the stream, so that a training that is resumed has no state to restore.
    """
    return seeded_uniform(weight.shape, f"{seed}/{step}/{name}").to(weight.device)


def counts_by_shape(allocation: str, shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, int]:
    """{matrix: weights pruned} as at one shot, by an allocation that knows shapes alone: uniform or erk."""
    counts = erk(shapes, [sparsity]) if allocation == "erk" else uniform(_sizes(shapes), [sparsity])
    return {name: pruned for name, (pruned,) in counts.items()}


def global_counts(
    shapes: Mapping[str, Sequence[int]], kept: Mapping[str, int], sparsity: float, kept_scores: Callable[[str], Tensor]
) -> dict[str, int]:
    """{matrix: weights pruned}, where the lowest scores of the whole model go, of those that are kept by now.

    kept_scores(name): of the kept weights, in the order of their positions; asked for three times. Raises `InputError`
    where a matrix would lose everything.
    """
    sizes = _sizes(shapes)
    total = pruned_count(sum(sizes.values()), sparsity)
    already = {name: size - kept[name] for name, size in sizes.items()}
    more = lowest_of_all(kept, [total - sum(already.values())], kept_scores)
    counts = {name: already[name] + more[name][0] for name in sizes}
    for name, pruned in counts.items():
        check_not_empty(name, sizes[name], pruned, sparsity)
    return counts


def _sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {name: prod(shape) for name, shape in shapes.items()}
