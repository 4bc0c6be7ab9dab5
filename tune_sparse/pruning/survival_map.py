"""Every level of a matrix from one pass over its scores, in the strict order (score, position).

The survival map of a matrix says of each weight how many levels it survives: with ascending pruned counts, level k
keeps exactly the weights whose value is above k. Finite scores that are not negative are ordered as their bits are,
so a histogram over the bits finds where each level cuts, and a table look-up applies all cuts at once. Only weights
that share a bin with a cut are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.models.float_bits import BITS, flat_chunks, view_bits

BINS = 1 << 15
"""Values of the upper 16 bits of a score that is not negative."""
MAX_LEVELS = 15
"""The largest number of 4 bits."""
UNSETTLED = 255


def survival_map(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Count the levels that each weight survives: uint8, in the shape of `scores`.

    scores: finite, of 16 or 32 bits, compared by their absolute values, so that magnitudes need no copy. counts:
    weights pruned at each level, ascending. Level k keeps what `keep_highest(scores.abs(), counts[k])` keeps.

    >>> survival_map(torch.tensor([0.1, 0.4, 0.2, 0.4, 0.3, 0.9]), [2, 4]).tolist()
    [0, 1, 0, 2, 1, 2]

    The first level prunes 0.1 and 0.2 (0), the second 0.3 and the earlier 0.4 too (1), the rest survives both (2).
    """
    assert len(counts) <= MAX_LEVELS
    assert list(counts) == sorted(counts)
    bits, cuts = view_bits(scores), torch.tensor(counts)
    histogram = bin_counts(scores)
    below = histogram.cumsum(0) - histogram
    # A weight of rank r survives level k if counts[k] <= r. A bin holds the ranks from below to below + histogram - 1:
    # if both ends survive as many levels, so does all of it. In the example the bin of 0.4 holds ranks 3 and 4, and the
    # cut at 4 lies between them: such a bin is unsettled.
    table = torch.searchsorted(cuts, below, right=True).to(torch.uint8)
    last = torch.searchsorted(cuts, below + histogram - 1, right=True).to(torch.uint8)
    shared = (table != last) & (histogram > 0)
    table[shared] = UNSETTLED
    table = table.to(scores.device)
    levels = torch.empty(bits.numel(), dtype=torch.uint8, device=scores.device)
    unsettled = []
    start = 0
    for chunk, out in zip(flat_chunks(bits), flat_chunks(levels), strict=True):
        torch.index_select(table, 0, _bins(chunk), out=out)
        unsettled.append(_positions(out == UNSETTLED) + start)
        start += len(chunk)
    # The unsettled weights, sorted, by position on a tie: a rank is how many come before it here, plus how many are in
    # the settled bins below (jumps). The two 0.4 are number 0 and 1 here, three weights are below: ranks 3 and 4.
    positions = torch.cat(unsettled)
    values, order = (bits[positions] & BITS[scores.dtype][1]).sort(stable=True)
    jumps = (below - (histogram * shared).cumsum(0) + histogram * shared).to(scores.device)
    ranks = jumps[_bins(values).long()] + torch.arange(len(values), device=scores.device)
    levels[positions[order]] = torch.searchsorted(cuts.to(scores.device), ranks, right=True).to(torch.uint8)
    return levels.view(scores.shape)


def below_all(scores: Tensor, kept: Tensor) -> Tensor:
    """The same order, by absolute values, but with the weights that are gone below all that are kept: those that score
    0 as well. What `survival_map` prunes first are then the former, so that masks only lose weights.

    scores: finite. kept: their mask. Both in one shape.
    """
    kind, magnitude, _ = BITS[scores.dtype]
    following = (scores.contiguous().view(kind) & magnitude) + 1  # the next larger number
    return (following * kept).view(scores.dtype)


def _positions(chosen: Tensor) -> Tensor:
    """Positions at which a flat bool tensor is true, ascending."""
    if chosen.device.type == "cpu":  # NumPy's is several times faster there
        return torch.from_numpy(np.flatnonzero(chosen.numpy()))
    return chosen.nonzero().squeeze(1)


def bin_counts(scores: Tensor) -> Tensor:
    """Count the scores with each value of the upper 16 bits: (BINS,), int64, on the CPU."""
    counts = torch.zeros(BINS, dtype=torch.int64, device=scores.device)
    for chunk in flat_chunks(view_bits(scores)):
        counts += torch.bincount(_bins(chunk), minlength=BINS)
    return counts.cpu()


def lower_counts(scores: Tensor, bin: int) -> Tensor:
    """Count the scores of one bin with each value of the lower 16 bits; 16-bit scores have only one value there."""
    bits = view_bits(scores)
    if bits.dtype == torch.int16:
        return (_bins(bits) == bin).sum().cpu()[None]
    inside = bits[_bins(bits) == bin] & 0xFFFF
    return torch.bincount(inside, minlength=1 << 16).cpu()


def tie_counts(scores: Tensor, pattern: int) -> tuple[int, int]:
    """(scores below the one with these bits, scores equal to it)."""
    bits = view_bits(scores) & BITS[scores.dtype][1]
    return int((bits < pattern).sum()), int((bits == pattern).sum())


def join_pattern(bin: int, lower: int, dtype: torch.dtype) -> int:
    """The bits of a score from its bin and its value there."""
    return bin if BITS[dtype][0] is torch.int16 else (bin << 16) | lower


def _bins(bits: Tensor) -> Tensor:
    """The upper 16 bits without the sign, as int32."""
    return (bits if bits.dtype == torch.int16 else bits >> 16).int() & (BINS - 1)


def row_survival_map(scores: Tensor, counts: Sequence[int], transposed: bool = False) -> Tensor:
    """As `survival_map`, compared within rows: each row loses the same number of weights at a level.

    scores: (O, I). What a count leaves after the division by O goes to the rows whose next weight is lowest, in the
    strict order; `transposed` says that positions count down the columns, as where the checkpoint stores (I, O).
    """
    rows, width = scores.shape
    order = scores.argsort(dim=1, stable=True)
    levels = torch.empty(rows, width, dtype=torch.uint8, device=scores.device)
    shares = torch.tensor([pruned // rows for pruned in counts])
    ranked = torch.searchsorted(shares, torch.arange(width), right=True).to(torch.uint8).to(scores.device)
    levels.scatter_(1, order, ranked.expand(rows, width))
    every = torch.arange(rows, device=scores.device)
    for share, rest in (divmod(pruned, rows) for pruned in counts):
        if rest:
            column = order[:, share]
            position = column * rows + every if transposed else every * width + column
            by_position = position.argsort()
            first = by_position[scores[every, column][by_position].argsort(stable=True)][:rest]
            levels[first, column[first]] -= 1
    return levels


def pack(levels: Tensor) -> Tensor:
    """Two levels a byte: the first half of the weights in the lower bits, the second in the upper; uint8."""
    flat = levels.flatten()
    half = (flat.numel() + 1) // 2
    packed = flat[:half].clone()
    packed[: flat.numel() - half] |= flat[half:] << 4
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The survival map that was packed."""
    total = torch.Size(shape).numel()
    if packed.numel() != (total + 1) // 2:
        raise InputError(
            f"a packed survival map of {tuple(shape)} must have {(total + 1) // 2} bytes, got {packed.numel()}. "
            "Make the masks again."
        )
    return torch.cat([packed & 15, packed >> 4])[:total].view(tuple(shape))


def group_survival_map(scores: Tensor, group: int, kept: int) -> Tensor:
    """One level: of each `group` neighbours in a row of scores (O, I), the `kept` highest survive, 1 else 0.

    On a tie the earlier goes (NVIDIA's 2:4 with the strict order; Mishra et al. 2021, arXiv:2104.08378).
    """
    groups = scores.reshape(-1, group)
    lowest = groups.argsort(dim=1, stable=True)[:, : group - kept]
    levels = torch.ones_like(groups, dtype=torch.uint8)
    return levels.scatter_(1, lowest, 0).view(scores.shape)
