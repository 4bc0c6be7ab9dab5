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
from tune_sparse.models.checkpoints import Shape
from tune_sparse.models.safetensors_io import TensorWriter, weight_files
from tune_sparse.pruning.masks import kept_lines
from tune_sparse.pruning.streaming import OpenCheckpoint, write_rest

CHANNEL_MULTIPLE = 8
"""Channels of an expert are a multiple of this: fused expert kernels want rows of whole 16 bytes."""

Lines = tuple[int, Tensor]
"""A dimension and the positions that are left along it."""


@dataclass(frozen=True)
class Cut:
    """What is left of a model: by block the key/value groups, by block and expert the channels, all equally many."""

    groups: dict[int, Tensor]
    channels: dict[tuple[int, int | None], Tensor]

    @property
    def kept_groups(self) -> int:
        return len(next(iter(self.groups.values())))

    @property
    def kept_channels(self) -> int:
        return len(next(iter(self.channels.values())))


def find_cut(checkpoint: OpenCheckpoint, masks: Mapping[str, Tensor]) -> Cut:
    """What masks leave whole. Raises `InputError` where they remove single weights and not whole lines."""
    shape, architecture = checkpoint.shape, checkpoint.architecture
    groups = {block: torch.zeros(shape.key_value_heads, dtype=torch.bool) for block in range(shape.layers)}
    channels: dict[tuple[int, int | None], Tensor] = {}
    for matrix in checkpoint.prunable.matrices:
        lines = _whole_lines(matrix, masks[matrix.name])
        if matrix.role in ("rows", "columns"):
            key = matrix.block, matrix.expert
            channels[key] = channels.get(key, torch.zeros_like(lines)) | lines
        else:
            per_group = lines.view(3, -1) if matrix.role == "fused" else lines[None]
            groups[matrix.block] |= per_group.view(len(per_group), shape.key_value_heads, -1).any(dim=2).any(dim=0)
    for matrix in checkpoint.prunable.matrices:
        is_channel = matrix.role in ("rows", "columns")
        kept = channels[matrix.block, matrix.expert] if is_channel else groups[matrix.block]
        if not torch.equal(_whole_lines(matrix, masks[matrix.name]), kept_lines(matrix, shape, kept, kept)):
            raise InputError(
                f"a model shrinks where whole heads and channels are masked, {matrix.name} keeps a part of one. "
                "Use masks of a structured method."
            )
    most_groups = max(int(kept.sum()) for kept in groups.values())
    if not architecture.heads_shrink:
        most_groups = shape.key_value_heads
    elif architecture.heads_divide:
        queries = shape.heads // shape.key_value_heads
        most_groups = next(n for n in range(most_groups, shape.key_value_heads + 1) if not shape.hidden % (n * queries))
    most_channels = max(int(kept.sum()) for kept in channels.values())
    if shape.experts > 1:
        most_channels = min(math.ceil(most_channels / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE, shape.channels)
    return Cut(
        {block: _filled(kept, most_groups) for block, kept in groups.items()},
        {key: _filled(kept, most_channels) for key, kept in channels.items()},
    )


def _whole_lines(matrix: Matrix, mask: Tensor) -> Tensor:
    """Lines that are kept, (lines,) bool. Raises `InputError` for a line that is kept in part."""
    across = int((matrix.role in ("output", "columns")) == matrix.transposed)
    kept = mask.bool().any(dim=across)
    if not torch.equal(kept, mask.bool().all(dim=across)):
        raise InputError(
            f"a model shrinks where whole heads and channels are masked, {matrix.name} keeps a part of one. "
            "Use masks of a structured method."
        )
    return kept


def _filled(kept: Tensor, wanted: int) -> Tensor:
    """Positions of `wanted` entries, ascending: those kept, then as many of the first that are not."""
    return (~kept).to(torch.uint8).argsort(stable=True)[:wanted].sort().values


def shrink(checkpoint: OpenCheckpoint, masks: Mapping[str, Tensor], folder: Path) -> Shape:
    """Write the smaller checkpoint of `checkpoint` under structured `masks` into `folder`; returns its shape.

    Read and written tensor by tensor. Raises `InputError` for masks that are not structured.
    """
    cut = find_cut(checkpoint, masks)
    lines: dict[str, Lines] = {}
    for matrix in checkpoint.prunable.matrices:
        lines |= _lines_left(checkpoint, matrix, cut)
    with atomic_folder(folder, replaces=True) as partial:
        for path in weight_files(checkpoint.path):
            _write_shard(checkpoint, path, masks, lines, partial)
        write_json(partial / "config.json", _config(checkpoint, cut))
        write_rest(checkpoint, partial)
    return Shape.of(type(checkpoint.config)(**read_json(folder / "config.json")))


def _write_shard(
    checkpoint: OpenCheckpoint, path: Path, masks: Mapping[str, Tensor], lines: Mapping[str, Lines], folder: Path
) -> None:
    tensors = checkpoint.tensors
    names = [name for name in tensors if tensors.paths[name] == path]
    shapes = {name: list(tensors.shapes[name]) for name in names}
    for name in names:
        if name in lines:
            along, kept = lines[name]
            shapes[name][along] = len(kept)
    with TensorWriter(folder / path.name, {name: (shapes[name], tensors.dtypes[name]) for name in names}) as writer:
        for name in names:
            tensor = tensors[name]
            if name in masks:
                tensor = tensor * masks[name].bool()
            writer.write(name, tensor.index_select(*lines[name]) if name in lines else tensor)
        writer.done()


def _lines_left(checkpoint: OpenCheckpoint, matrix: Matrix, cut: Cut) -> dict[str, Lines]:
    """Of one layer: the lines of its matrix that are left, and the entries of a bias of its rows."""
    shape = checkpoint.shape
    if matrix.role in ("rows", "columns"):
        left = cut.channels[matrix.block, matrix.expert]
    else:
        groups = torch.zeros(shape.key_value_heads, dtype=torch.bool)
        groups[cut.groups[matrix.block]] = True
        left = kept_lines(matrix, shape, groups, groups).nonzero().squeeze(1)
    is_rows = matrix.role not in ("output", "columns")
    lines = {matrix.name: (int(is_rows == matrix.transposed), left)}
    bias = matrix.name.removesuffix("weight") + "bias"
    return lines | ({bias: (0, left)} if is_rows and bias in checkpoint.tensors else {})


def _config(checkpoint: OpenCheckpoint, cut: Cut) -> dict[str, Any]:
    config: dict[str, Any] = read_json(checkpoint.path / "config.json")
    config[checkpoint.architecture.channels] = cut.kept_channels
    if checkpoint.architecture.heads_shrink:
        shape = checkpoint.shape
        config["num_key_value_heads"] = cut.kept_groups
        config["num_attention_heads"] = cut.kept_groups * (shape.heads // shape.key_value_heads)
        config["head_dim"] = shape.head_dim
    return config
