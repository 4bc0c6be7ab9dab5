"""Which weights go: keep-masks (True = kept) from scores, and how to count, compare and apply them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.models.architectures import Matrix
from tune_sparse.models.checkpoints import Shape
from tune_sparse.pruning.methods import TOLERANCE

Masks = dict[str, Tensor]
"""{checkpoint tensor name: keep-mask in the checkpoint's layout, bool}"""


def keep_highest(scores: Tensor, pruned: int) -> Tensor:
    """A keep-mask without the `pruned` lowest of `scores`; on a tie the earlier position goes first.

    The plain definition: `tune_sparse.pruning.level_maps` computes the same for many counts at once.
    """
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(stable=True)[:pruned]] = False
    return keep.view(scores.shape)


def pruned_count(total: int, sparsity: float) -> int:
    """How many of `total` go: the requested number, rounded, but never all of them."""
    return min(round(sparsity * total), total - 1)


def structured_counts(shape: Shape, sparsity: float) -> tuple[int, int]:
    """(key/value groups, feed-forward channels) that each block loses to reach `sparsity`.

    A group is the query rows that share a key/value head, its key and value rows and its output columns. Each
    expert of a block loses the same number of channels. Groups are coarse, so the channels make up the difference.
    Raises `InputError` where that cannot come within `TOLERANCE`.
    """
    group = 2 * shape.hidden * shape.head_dim * (shape.heads // shape.key_value_heads + 1)
    channel = shape.channel_matrices * shape.hidden
    total = shape.key_value_heads * group + shape.channels * channel
    nearest = sorted(range(shape.key_value_heads), key=lambda groups: abs(groups - sparsity * shape.key_value_heads))
    reached = []
    for groups in nearest:
        channels = round((sparsity * total - groups * group) / channel)
        channels = max(0, min(channels, shape.channels - 1))
        reached.append((groups * group + channels * channel) / total)
        if abs(reached[-1] - sparsity) <= TOLERANCE:
            return groups, channels
    raise InputError(
        f"structured sparsity must come within {TOLERANCE:g} of the target: with {shape.key_value_heads} key/value "
        f"groups and {shape.channels} channels a block reaches {reached[0]:.3f}, got {sparsity:g}. "
        "Choose another sparsity or an element-wise method."
    )


def kept_lines(matrix: Matrix, shape: Shape, groups: Tensor, channels: Tensor) -> Tensor:
    """Rows, or columns for the roles output and columns, of a matrix that stay: (lines,), bool.

    groups: (key/value heads,), channels: (channels,), both bool.
    """
    if matrix.role in ("rows", "columns"):
        return channels
    if matrix.role == "keys":
        return groups.repeat_interleave(shape.head_dim)
    queries = groups.repeat_interleave(shape.head_dim * (shape.heads // shape.key_value_heads))
    return queries.repeat(3) if matrix.role == "fused" else queries


def group_parts(matrix: Matrix, shape: Shape, scores: Tensor) -> Tensor:
    """The scores (O, I) of one matrix by the group or channel that they fall with: (G, ...)."""
    groups = shape.key_value_heads
    if matrix.role == "fused":
        return scores.reshape(3, groups, -1).transpose(0, 1)
    if matrix.role in ("queries", "keys"):
        return scores.reshape(groups, -1)
    if matrix.role == "output":
        return scores.T.reshape(groups, -1)
    return scores if matrix.role == "rows" else scores.T


def line_mask(matrix: Matrix, shape: Shape, lines: Tensor) -> Tensor:
    """The keep-mask, in the checkpoint's layout, of a matrix that loses whole lines."""
    is_columns = matrix.role in ("output", "columns")
    if is_columns != matrix.transposed:
        return lines[None, :].expand(shape.hidden, -1)
    return lines[:, None].expand(-1, shape.hidden)


def masked(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Weights with zeros where a mask does not keep them."""
    return {name: weight * masks[name] for name, weight in weights.items()}


def count_sparsity(masks: Mapping[str, Tensor]) -> float:
    """Fraction of zeros, counted over all matrices."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    return 1 - kept / sum(mask.numel() for mask in masks.values())


def mask_sha256(masks: Mapping[str, Tensor]) -> str:
    """A checksum over names, shapes and bits, matrix by matrix in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name].cpu().bool().numpy()
        digest.update(f"{name}{mask.shape}".encode())
        digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()
