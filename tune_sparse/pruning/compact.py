"""A physically smaller checkpoint that computes what a structurally masked one computes.

Heads and channels whose every weight is masked are cut out. Stock transformers wants equal sizes in all blocks, so
each block keeps as many as the largest needs, filled up with masked ones, whose weights are 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.files import atomic_folder, read_json, write_json
from tune_sparse.models.architectures import Matrix
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.safetensors_io import TensorWriter, weight_files
from tune_sparse.pruning.masks import kept_channels
from tune_sparse.pruning.streaming import OpenCheckpoint, write_rest

CHANNEL_MULTIPLE = 8
"""Channels of an expert are a multiple of this: fused expert kernels want rows of whole 16 bytes."""

Positions = tuple[int, Tensor]
"""A dimension and the positions that are left along it."""


class KeptInPartError(InputError):
    """Masks keep a part of a head or channel."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__(
            f"a model can be made compact where whole heads and channels are masked, {matrix.name} keeps a part of "
            "one. Use masks of a structured method."
        )


@dataclass(frozen=True)
class KeptStructure:
    """The part of a model that stays: key/value groups by block, channels by block and expert, bool each."""

    dims: ModelDims
    groups: dict[int, Tensor]
    channels: dict[tuple[int, int | None], Tensor]

    def channels_of(self, matrix: Matrix) -> Tensor:
        """Rows, or columns for the roles o and down, that stay of a matrix: (channels,), bool."""
        if not matrix.is_attention:
            return self.channels[matrix.block, matrix.expert]
        groups = self.groups[matrix.block]
        return kept_channels(matrix, self.dims, groups, groups)

    def positions(self, matrix: Matrix) -> Positions:
        """What stays of a matrix in the checkpoint's layout."""
        return int(matrix.has_channel_columns != matrix.transposed), self.channels_of(matrix).nonzero().squeeze(1)

    @property
    def most_groups(self) -> int:
        return max(int(kept.sum()) for kept in self.groups.values())

    @property
    def most_channels(self) -> int:
        return max(int(kept.sum()) for kept in self.channels.values())


def find_structure(dims: ModelDims, matrices: Sequence[Matrix], masks: Mapping[str, Tensor]) -> KeptStructure:
    """Find the groups and channels that masks keep, on the CPU. The mask of each matrix is read once.

    Raises `KeptInPartError` where masks remove single weights, or lines of one matrix that its block keeps elsewhere.
    """
    kept = {matrix: _whole_channels(matrix, masks[matrix.name]) for matrix in matrices}
    structure = KeptStructure(dims, {}, {})
    for matrix, lines in kept.items():
        if matrix.is_attention:
            heads = lines.view(3 if matrix.role == "qkv" else 1, dims.num_kv_heads, -1).any(dim=2).any(dim=0)
            structure.groups[matrix.block] = structure.groups.get(matrix.block, torch.zeros_like(heads)) | heads
        else:
            key = matrix.block, matrix.expert
            structure.channels[key] = structure.channels.get(key, torch.zeros_like(lines)) | lines
    for matrix, lines in kept.items():
        if not torch.equal(lines, structure.channels_of(matrix)):
            raise KeptInPartError(matrix)
    return structure


def _whole_channels(matrix: Matrix, mask: Tensor) -> Tensor:
    """Channels that are kept, (channels,) bool. Raises `KeptInPartError` for a channel that is kept in part."""
    across = int(matrix.has_channel_columns == matrix.transposed)
    kept = mask.bool().any(dim=across)
    if not torch.equal(kept, mask.bool().all(dim=across)):
        raise KeptInPartError(matrix)
    return kept.cpu()


def loadable(checkpoint: OpenCheckpoint, structure: KeptStructure) -> KeptStructure:
    """Fill a structure up with masked groups and channels until stock transformers can load it: equally many
    everywhere."""
    groups = _loadable_groups(checkpoint, structure.most_groups)
    channels = _loadable_channels(checkpoint.dims, structure.most_channels)
    return KeptStructure(
        structure.dims,
        {block: _padded(kept, groups) for block, kept in structure.groups.items()},
        {key: _padded(kept, channels) for key, kept in structure.channels.items()},
    )


def _loadable_groups(checkpoint: OpenCheckpoint, groups: int) -> int:
    """The fewest key/value groups, at least `groups`, with which stock transformers loads the model."""
    dims = checkpoint.dims
    if not checkpoint.architecture.heads_shrink:
        return dims.num_kv_heads
    if not checkpoint.architecture.heads_divide:
        return groups
    return next(n for n in range(groups, dims.num_kv_heads + 1) if not dims.hidden_size % (n * dims.heads_per_group))


def _loadable_channels(dims: ModelDims, channels: int) -> int:
    if dims.num_experts == 1:
        return channels
    return min(math.ceil(channels / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE, dims.intermediate_size)


def _padded(kept: Tensor, wanted: int) -> Tensor:
    """`wanted` entries kept: those that are, then as many of the first that are not."""
    first = (~kept).to(torch.uint8).argsort(stable=True)[:wanted]
    return torch.zeros_like(kept).index_fill(0, first, True)


def compact(checkpoint: OpenCheckpoint, masks: Mapping[str, Tensor], folder: Path) -> ModelDims:
    """Write the smaller checkpoint of `checkpoint` under structured `masks` into `folder`; returns its shape.

    Read and written tensor by tensor. Raises `InputError` for masks that are not structured.
    """
    structure = loadable(checkpoint, find_structure(checkpoint.dims, checkpoint.prunable.matrices, masks))
    positions: dict[str, Positions] = {}
    for matrix in checkpoint.prunable.matrices:
        positions |= _positions_left(checkpoint, matrix, structure)
    with atomic_folder(folder, replaces=True) as partial:
        for path in weight_files(checkpoint.path):
            _write_shard(checkpoint, path, masks, positions, partial)
        write_json(partial / "config.json", _config(checkpoint, structure))
        write_rest(checkpoint, partial)
    return ModelDims.from_config(type(checkpoint.config)(**read_json(folder / "config.json")))


def _write_shard(
    checkpoint: OpenCheckpoint,
    path: Path,
    masks: Mapping[str, Tensor],
    positions: Mapping[str, Positions],
    folder: Path,
) -> None:
    tensors = checkpoint.tensors
    names = [name for name in tensors if tensors.paths[name] == path]
    shapes = {name: list(tensors.shapes[name]) for name in names}
    for name in names:
        if name in positions:
            along, kept = positions[name]
            shapes[name][along] = len(kept)
    with TensorWriter(folder / path.name, {name: (shapes[name], tensors.dtypes[name]) for name in names}) as writer:
        for name in names:
            tensor = tensors[name]
            if name in masks:
                tensor = tensor * masks[name].bool()
            writer.write(name, tensor.index_select(*positions[name]) if name in positions else tensor)
        writer.done()


def _positions_left(checkpoint: OpenCheckpoint, matrix: Matrix, structure: KeptStructure) -> dict[str, Positions]:
    """Positions that are left in the matrix of one layer, and in a bias of its rows."""
    along, left = structure.positions(matrix)
    bias = matrix.name.removesuffix("weight") + "bias"
    has_bias = not matrix.has_channel_columns and bias in checkpoint.tensors
    return {matrix.name: (along, left)} | ({bias: (0, left)} if has_bias else {})


def _config(checkpoint: OpenCheckpoint, structure: KeptStructure) -> dict[str, Any]:
    config: dict[str, Any] = read_json(checkpoint.path / "config.json")
    config[checkpoint.architecture.channels] = structure.most_channels
    if checkpoint.architecture.heads_shrink:
        dims = checkpoint.dims
        config["num_key_value_heads"] = structure.most_groups
        config["num_attention_heads"] = structure.most_groups * dims.heads_per_group
        config["head_dim"] = dims.head_dim
    return config
