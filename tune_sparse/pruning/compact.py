"""A physically smaller checkpoint that computes what a structurally masked one computes.

Heads and channels whose every weight is masked are cut out. Stock transformers wants equal sizes in all blocks, so
each block keeps as many as the largest needs, filled up with masked ones, whose weights are 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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


@dataclass(frozen=True)
class KeptStructure:
    """The part of a model that stays: key/value groups by block, channels by block and expert, all equally many."""

    groups: dict[int, Tensor]
    channels: dict[tuple[int, int | None], Tensor]

    @property
    def kept_groups(self) -> int:
        return len(next(iter(self.groups.values())))

    @property
    def kept_channels(self) -> int:
        return len(next(iter(self.channels.values())))


def find_structure(checkpoint: OpenCheckpoint, masks: Mapping[str, Tensor]) -> KeptStructure:
    """Find the groups and channels that masks keep, padded to be equally many everywhere.

    Raises `InputError` where masks remove single weights and not whole channels.
    """
    groups, channels = _kept_units(checkpoint, masks)
    for matrix in checkpoint.prunable.matrices:
        kept = groups[matrix.block] if matrix.is_attention else channels[matrix.block, matrix.expert]
        wanted = kept_channels(matrix, checkpoint.dims, kept, kept)
        if not torch.equal(_whole_channels(matrix, masks[matrix.name]), wanted):
            raise _kept_in_part(matrix)
    most_groups = _loadable_groups(checkpoint, max(int(kept.sum()) for kept in groups.values()))
    most_channels = _loadable_channels(checkpoint.dims, max(int(kept.sum()) for kept in channels.values()))
    return KeptStructure(
        {block: _padded(kept, most_groups) for block, kept in groups.items()},
        {key: _padded(kept, most_channels) for key, kept in channels.items()},
    )


def _kept_units(
    checkpoint: OpenCheckpoint, masks: Mapping[str, Tensor]
) -> tuple[dict[int, Tensor], dict[tuple[int, int | None], Tensor]]:
    """({block: key/value groups}, {(block, expert): channels}) of which any matrix keeps something, both bool."""
    dims = checkpoint.dims
    groups = {block: torch.zeros(dims.num_kv_heads, dtype=torch.bool) for block in range(dims.num_layers)}
    channels: dict[tuple[int, int | None], Tensor] = {}
    for matrix in checkpoint.prunable.matrices:
        kept = _whole_channels(matrix, masks[matrix.name])
        if matrix.is_attention:
            per_group = kept.view(3, -1) if matrix.role == "qkv" else kept[None]
            groups[matrix.block] |= per_group.view(len(per_group), dims.num_kv_heads, -1).any(dim=2).any(dim=0)
        else:
            key = matrix.block, matrix.expert
            channels[key] = channels.get(key, torch.zeros_like(kept)) | kept
    return groups, channels


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


def _whole_channels(matrix: Matrix, mask: Tensor) -> Tensor:
    """Channels that are kept, (channels,) bool. Raises `InputError` for a channel that is kept in part."""
    across = int(matrix.has_channel_columns == matrix.transposed)
    kept = mask.bool().any(dim=across)
    if not torch.equal(kept, mask.bool().all(dim=across)):
        raise _kept_in_part(matrix)
    return kept


def _kept_in_part(matrix: Matrix) -> InputError:
    return InputError(
        f"a model can be made compact where whole heads and channels are masked, {matrix.name} keeps a part of one. "
        "Use masks of a structured method."
    )


def _padded(kept: Tensor, wanted: int) -> Tensor:
    """Positions of `wanted` entries, ascending: those kept, then as many of the first that are not."""
    return (~kept).to(torch.uint8).argsort(stable=True)[:wanted].sort().values


def compact(checkpoint: OpenCheckpoint, masks: Mapping[str, Tensor], folder: Path) -> ModelDims:
    """Write the smaller checkpoint of `checkpoint` under structured `masks` into `folder`; returns its shape.

    Read and written tensor by tensor. Raises `InputError` for masks that are not structured.
    """
    structure = find_structure(checkpoint, masks)
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
    dims = checkpoint.dims
    if not matrix.is_attention:
        left = structure.channels[matrix.block, matrix.expert]
    else:
        groups = torch.zeros(dims.num_kv_heads, dtype=torch.bool)
        groups[structure.groups[matrix.block]] = True
        left = kept_channels(matrix, dims, groups, groups).nonzero().squeeze(1)
    is_rows = not matrix.has_channel_columns
    positions = {matrix.name: (int(is_rows == matrix.transposed), left)}
    bias = matrix.name.removesuffix("weight") + "bias"
    return positions | ({bias: (0, left)} if is_rows and bias in checkpoint.tensors else {})


def _config(checkpoint: OpenCheckpoint, structure: KeptStructure) -> dict[str, Any]:
    config: dict[str, Any] = read_json(checkpoint.path / "config.json")
    config[checkpoint.architecture.channels] = structure.kept_channels
    if checkpoint.architecture.heads_shrink:
        dims = checkpoint.dims
        config["num_key_value_heads"] = structure.kept_groups
        config["num_attention_heads"] = structure.kept_groups * dims.heads_per_group
        config["head_dim"] = dims.head_dim
    return config
