"""The tensors of a stored pruning, written and read one matrix at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.files import aside, write_json
from tune_sparse.ledger.prunings import (
    DESCRIPTION,
    FORMAT_VERSION,
    MASKS,
    WEIGHTS,
    StoredPruning,
    broken,
    file_sha256,
    take_free_name,
)
from tune_sparse.models.safetensors_io import TensorFiles, TensorWriter
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.mask_io import SHAPES
from tune_sparse.watchdog import heartbeat


class StoredWeights(Mapping[str, Tensor]):
    """{matrix: its pruned weight, zeros included}; the kept weights are read from a file when it is asked for."""

    def __init__(self, files: TensorFiles, masks: BitMasks) -> None:
        self._files, self._masks = files, masks

    def __getitem__(self, name: str) -> Tensor:
        mask = self._masks[name]
        kept = self._files[name].to(mask.device)
        return torch.zeros(mask.shape, dtype=kept.dtype, device=mask.device).masked_scatter_(mask, kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


def read_masks(stored: StoredPruning, device: torch.device) -> BitMasks:
    """Read the masks. Raises `NotReadyError` for files whose bits are not those that were stored."""
    stored.verify()
    files = _open(stored.folder / MASKS)
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(files.metadata()[SHAPES]).items()}
    except (ValueError, LookupError) as error:
        raise broken(stored.folder, f"{MASKS} has no shapes ({type(error).__name__}: {error})") from error
    bits, kept = {}, {}
    for name in shapes:
        packed = files[name]
        bits[name], kept[name] = packed.to(device, copy=True), int(np.bitwise_count(packed.numpy()).sum())
    return BitMasks(bits, shapes, kept)


def read_weights(stored: StoredPruning, masks: BitMasks) -> StoredWeights:
    """The pruned weights, for a method that updates them, on the device of `masks`. Raises as `read_masks`."""
    stored.verify()
    return StoredWeights(_open(stored.folder / WEIGHTS), masks)


def _open(path: Path) -> TensorFiles:
    try:
        return TensorFiles([path])
    except InputError as error:
        raise broken(path.parent, str(error)) from error


def write_pruning(
    folder: Path,
    settings: Mapping[str, Any],
    masks: BitMasks,
    weights: Mapping[str, Tensor] | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write a pruning into a folder that appears when it is whole; one that is there already stays.

    weights: {matrix: its pruned weight}, for a method that updates them.
    """
    if folder.exists():  # another worker was faster
        return
    partial = aside(folder)
    partial.mkdir(parents=True)
    try:
        files = [_write_masks(partial / MASKS, masks)]
        if weights is not None:
            files.append(_write_kept(partial / WEIGHTS, masks, weights))
        sizes = {path.name: path.stat().st_size for path in files}
        checksums = {path.name: file_sha256(path) for path in files}
        stored = StoredPruning(partial, dict(settings), masks.sha256, sizes, checksums, dict(provenance))
        described = {name: value for name, value in asdict(stored).items() if name != "folder"}
        write_json(partial / DESCRIPTION, {"format_version": FORMAT_VERSION} | described)
        take_free_name(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_masks(path: Path, masks: BitMasks) -> Path:
    shapes = {SHAPES: json.dumps({name: list(shape) for name, shape in masks.shapes.items()})}
    bits = {name: (tuple(bits.shape), torch.uint8) for name, bits in masks.bits.items()}
    return _write(path, bits, masks.bits.items(), shapes)


def _write_kept(path: Path, masks: BitMasks, weights: Mapping[str, Tensor]) -> Path:
    """Each tensor holds the kept weights of one matrix, row by row: (kept,)."""
    dtype = weights[next(iter(masks))].dtype
    kept = {name: ((masks.kept[name],), dtype) for name in masks}
    return _write(path, kept, ((name, weights[name][masks[name]]) for name in masks))


def _write(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    with TensorWriter(path, shapes, metadata) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
            heartbeat()
        writer.done()
    return path
