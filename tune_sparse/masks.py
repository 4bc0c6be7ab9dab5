"""Which weights go: keep-masks (True = kept) from scores, and how to count, compare and apply them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.models import Shape

Masks = dict[str, Tensor]
"""{checkpoint tensor name: keep-mask (O, I), bool}"""

TOLERANCE = 0.01
"""How far the achieved sparsity may be from the asked one."""


def keep_highest(scores: Tensor, pruned: int) -> Tensor:
    """A keep-mask without the `pruned` lowest of `scores`; on a tie the earlier position goes first."""
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(stable=True)[:pruned]] = False
    return keep.view(scores.shape)


def pruned_count(total: int, sparsity: float) -> int:
    """How many of `total` go: the asked number, rounded, but never all of them."""
    return min(round(sparsity * total), total - 1)


def structured_counts(shape: Shape, sparsity: float) -> tuple[int, int]:
    """(key/value groups, feed-forward channels) that each block loses to reach `sparsity`.

    A group is the query rows that share a key/value head, its key and value rows and its output columns. Groups
    are coarse, so the channels make up the difference. Raises `InputError` where that cannot come within
    `TOLERANCE`.
    """
    group = 2 * shape.hidden * shape.head_dim * (shape.heads // shape.key_value_heads + 1)
    channel = 3 * shape.hidden
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


def block_masks(shape: Shape, keep_groups: Tensor, keep_channels: Tensor) -> dict[str, Tensor]:
    """Masks of one block's matrices, by layer name.

    keep_groups: (key/value heads,), keep_channels: (channels,), both bool.
    """
    hidden = shape.hidden
    keys = keep_groups.repeat_interleave(shape.head_dim)
    queries = keep_groups.repeat_interleave(shape.head_dim * (shape.heads // shape.key_value_heads))
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": keep_channels, "up_proj": keep_channels}
    columns = {"o_proj": queries, "down_proj": keep_channels}
    return {name: keep[:, None].expand(-1, hidden).contiguous() for name, keep in rows.items()} | {
        name: keep[None, :].expand(hidden, -1).contiguous() for name, keep in columns.items()
    }


def masked(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Weights with zeros where a mask does not keep them."""
    return {name: weight * masks[name] for name, weight in weights.items()}


def sparsity_of(masks: Masks) -> float:
    """Fraction of zeros, counted over all matrices."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    return 1 - kept / sum(mask.numel() for mask in masks.values())


def mask_sha256(masks: Masks) -> str:
    """A checksum over names, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name].cpu().bool().numpy()
        digest.update(f"{name}{mask.shape}".encode())
        digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()
