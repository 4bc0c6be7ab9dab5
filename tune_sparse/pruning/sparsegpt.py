"""SparseGPT: weights are removed column by column, and the columns to the right make up for each error
(Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1).

The loop works on Wᵀ, so that a column of W is contiguous, and updates in blocks within blocks: most of the work is
matrix products. Within a block of columns the lowest w²/U² go, in the strict order, with exact counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tune_sparse.pruning.masks import keep_highest
from tune_sparse.pruning.survival_map import below_all, survival_map

DAMPING = 0.01
"""Fraction of the mean of the Hessian's diagonal that is added to it."""
BLOCK = 128
"""Columns whose mask is chosen at once."""
SUB_BLOCK = 16
"""Columns updated one by one before the rest of the block is; a multiple of the widest N:M group."""


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = (H + damping)⁻¹. hessian: (I, I) in fp32, kept as it is.

    From one Cholesky factor: with J the reversal, J H J = L Lᵀ gives U = J L⁻¹ J. L⁻¹ takes the place of the damped
    matrix, so that no more than two matrices of this size, 485 MB each at 7B, are in memory at once, and the Hessian
    if the caller keeps it.
    """
    damped = hessian.flip(0, 1)
    del hessian
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    lower = torch.linalg.cholesky(damped)
    inverse = torch.eye(len(lower), out=damped).T  # column-major, as the solver has it: it copies nothing
    del damped, diagonal
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def sparsegpt(
    weight: Tensor,
    factor: Tensor,
    pruned: int,
    group: tuple[int, int] | None = None,
    transposed: bool = False,
    dead: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weight with `pruned` zeros and the rest updated, in fp32; keep-mask): both (O, I).

    weight: (O, I), factor: (I, I) from `inverse_factor`. group: (kept, of so many neighbours in a row) decides
    instead of `pruned`. `transposed`: positions count as in a stored (I, O). dead: (I,) of bool, inputs that are always
    0; what reads them becomes 0 first, as the authors' code has it, so that it goes before weights that do something.
    kept: (O, I) of bool, a mask that the weight has already; what is gone is among those that go. Like them it may make
    up for errors to its left until its column is reached, and its own error is made up for to its right.
    """
    columns = weight.T.to(torch.float32, copy=True).contiguous()
    if dead is not None:
        columns.masked_fill_(dead[:, None], 0)
    keep = torch.ones_like(columns, dtype=torch.bool)
    before = None if kept is None else kept.T
    width, gone = len(columns), 0
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        if group is None:
            here = None if before is None else before[start:stop]
            already = 0 if here is None else int((~here).sum())
            share = max(pruned * stop // width - gone, already)
            keep[start:stop] = _keep(columns[start:stop], factor.diagonal()[start:stop], share, transposed, here)
            gone += share
        errors = _prune_block(columns, keep, factor, start, stop, group)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return columns.T, keep.T


def _prune_block(
    columns: Tensor, keep: Tensor, factor: Tensor, start: int, stop: int, group: tuple[int, int] | None
) -> Tensor:
    """Prune the columns of one block, in place; returns what each lost, over its diagonal: (columns, O)."""
    errors = torch.empty_like(columns[start:stop])
    for first in range(start, stop, SUB_BLOCK):
        last = min(first + SUB_BLOCK, stop)
        for i in range(first, last):
            if group and (i - start) % group[1] == 0:
                _keep_group(columns, keep, factor, slice(i, i + group[1]), group[0])
            error = torch.mul(columns[i], ~keep[i], out=errors[i - start]).div_(factor[i, i])
            columns[i].mul_(keep[i])
            columns[i + 1 : last].addr_(factor[i, i + 1 : last], error, alpha=-1)
        columns[last:stop].addmm_(factor[first:last, last:stop].T, errors[first - start : last - start], alpha=-1)
    return errors


def _scores(columns: Tensor, diagonal: Tensor) -> Tensor:
    """w² / U²: the output error of removing a weight (eq. 3), by column."""
    return columns.square() / diagonal.square()[:, None]


def _keep(columns: Tensor, diagonal: Tensor, pruned: int, transposed: bool, kept: Tensor | None) -> Tensor:
    scores = _scores(columns, diagonal)
    if kept is not None:
        scores = below_all(scores, kept)
    if scores.device.type != "cpu":  # a sort waits for nothing there
        return keep_highest(scores, pruned) if transposed else keep_highest(scores.T, pruned).T
    return survival_map(scores, [pruned]) > 0 if transposed else (survival_map(scores.T, [pruned]) > 0).T


def _keep_group(columns: Tensor, keep: Tensor, factor: Tensor, at: slice, kept: int) -> None:
    scores = _scores(columns[at], factor.diagonal()[at])
    lowest = scores.argsort(dim=0, stable=True)[: len(scores) - kept]
    keep[at] = keep[at].scatter(0, lowest, False)
