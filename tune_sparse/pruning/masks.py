"""Keep-masks (True = kept): made from scores, counted, compared and applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.models.architectures import Matrix, architecture_named
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.float_bits import BITS, flat_chunks, view_bits
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.methods import TOLERANCE

Masks = Mapping[str, Tensor]
"""{checkpoint tensor name: keep-mask in the checkpoint's layout, bool}"""
SCORES_AT_ONCE = 1 << 22
"""Scores that are normed together, in float64."""


def keep_highest(scores: Tensor, pruned: int) -> Tensor:
    """A keep-mask without the `pruned` lowest of `scores`; on a tie the earlier position goes first.

    The plain definition: `tune_sparse.pruning.survival_map` computes the same for many counts at once.
    """
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(stable=True)[:pruned]] = False
    return keep.view(scores.shape)


def pruned_count(total: int, sparsity: float) -> int:
    """The number of weights that go, of `total`: the target rounded, but never all of them."""
    return min(round(sparsity * total), total - 1)


def structured_counts(dims: ModelDims, sparsity: float) -> tuple[int, int]:
    """(key/value groups, feed-forward channels) that each block loses to reach `sparsity`.

    A group is the query rows that share a key/value head, its key and value rows and its output columns. Each
    expert of a block loses the same number of channels. Groups are coarse, so the channels make up the difference.
    Raises `InputError` where that cannot come within `TOLERANCE`.
    """
    group, channel = _unit_weights(dims)
    total = dims.num_kv_heads * group + dims.intermediate_size * channel
    nearest = sorted(range(dims.num_kv_heads), key=lambda groups: abs(groups - sparsity * dims.num_kv_heads))
    reached = []
    for groups in nearest:
        channels = round((sparsity * total - groups * group) / channel)
        channels = max(0, min(channels, dims.intermediate_size - 1))
        reached.append((groups * group + channels * channel) / total)
        if abs(reached[-1] - sparsity) <= TOLERANCE:
            return groups, channels
    raise InputError(
        f"structured sparsity must come within {TOLERANCE:g} of the target: with {dims.num_kv_heads} key/value "
        f"groups and {dims.intermediate_size} channels a block reaches {reached[0]:.3f}, got {sparsity:g}. "
        "Choose another sparsity or an element-wise method."
    )


def _unit_weights(dims: ModelDims) -> tuple[int, int]:
    """Weights of a key/value group, and of a feed-forward channel over all experts, in one block."""
    matrices = architecture_named(dims.architecture).expected(replace(dims, num_layers=1))
    attention, whole = (
        sum(prod(matrix.size(dims)) for matrix in part)
        for part in ([matrix for matrix in matrices if matrix.is_attention], matrices)
    )
    return attention // dims.num_kv_heads, (whole - attention) // dims.intermediate_size


def kept_channels(matrix: Matrix, dims: ModelDims, groups: Tensor, channels: Tensor) -> Tensor:
    """Rows, or columns for the roles o and down, of a matrix that stay: (channels,), bool.

    groups: (key/value heads,), channels: (channels,), both bool.
    """
    if not matrix.is_attention:
        return channels
    if matrix.role == "kv":
        return groups.repeat_interleave(dims.head_dim)
    queries = groups.repeat_interleave(dims.head_dim * dims.heads_per_group)
    return queries.repeat(3) if matrix.role == "qkv" else queries


def group_parts(matrix: Matrix, dims: ModelDims, scores: Tensor) -> Tensor:
    """The scores (O, I) of one matrix by the group or channel that they fall with: (G, ...)."""
    groups = dims.num_kv_heads
    if matrix.role == "qkv":
        return scores.reshape(3, groups, -1).transpose(0, 1)
    if matrix.role in ("q", "kv"):
        return scores.reshape(groups, -1)
    if matrix.role == "o":
        return scores.T.reshape(groups, -1)
    return scores if matrix.role == "up" else scores.T


def group_norms(*parts: Tensor) -> Tensor:
    """L2 norm of each group of scores that fall together (Li et al. 2017, arXiv:1608.08710).

    parts: (G, ...) each, row g holding the scores that group g has in that matrix; the result is (G,), in float64, so
    that norms that nearly tie are ordered the same whatever the order of the additions.
    """
    groups = max(1, SCORES_AT_ONCE * len(parts[0]) // sum(part.numel() for part in parts))
    norms = [
        torch.cat([part.flatten(1).double() for part in some], dim=1).norm(dim=1)
        for some in zip(*(part.split(groups) for part in parts), strict=True)
    ]
    return torch.cat(norms)


def channel_mask(matrix: Matrix, dims: ModelDims, channels: Tensor) -> Tensor:
    """The keep-mask, in the checkpoint's layout, of a matrix that loses whole channels."""
    if matrix.has_channel_columns != matrix.transposed:
        return channels[None, :].expand(dims.hidden_size, -1)
    return channels[:, None].expand(-1, dims.hidden_size)


def mask_into(weight: Tensor, mask: Tensor) -> None:
    """W <- W⊙M, in place; as in a product, a zero keeps the sign of its weight."""
    if weight.device.type != "cpu" or weight.dtype not in BITS or not weight.is_contiguous():
        weight.mul_(mask)
        return
    # A CPU clears bits four times as fast as it multiplies by a mask.
    kind, magnitude, _ = BITS[weight.dtype]
    for bits, keep in zip(flat_chunks(view_bits(weight)), flat_chunks(mask.flatten()), strict=True):
        bits.bitwise_and_(keep.to(kind).neg_().bitwise_or_(~magnitude))


@dataclass(frozen=True)
class MaskedWeights(Mapping[str, Tensor]):
    """{matrix: W⊙M}, made of a dense weight and a mask when it is asked for."""

    dense: Mapping[str, Tensor]
    """makes each weight anew, to be written into"""
    masks: Masks

    def __getitem__(self, name: str) -> Tensor:
        weight = self.dense[name]
        mask_into(weight, self.masks[name])
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)


def packed(masks: Masks) -> BitMasks:
    """The same masks as bits, whose counts and checksum are known."""
    return masks if isinstance(masks, BitMasks) else BitMasks.pack((name, masks[name].bool()) for name in masks)


def nonzero_masks(weights: Mapping[str, Tensor]) -> BitMasks:
    """The masks that weights show: all that is not 0 is kept."""
    return BitMasks.pack((name, weight != 0) for name, weight in weights.items())


def count_sparsity(masks: Masks) -> float:
    """Fraction of zeros, counted over all matrices."""
    return packed(masks).sparsity


def mask_sha256(masks: Masks) -> str:
    """A checksum over names, shapes and bits, matrix by matrix in the order of their names."""
    return packed(masks).sha256
