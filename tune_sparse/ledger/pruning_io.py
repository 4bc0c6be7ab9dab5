"""The tensors of a stored pruning, written and read one matrix at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from tune_sparse.pruning.mask_io import read_bits, write_bits
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
    try:
        return read_bits(stored.folder / MASKS, device)
    except InputError as error:
        raise broken(stored.folder, str(error)) from error


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
        files = [write_bits(partial / MASKS, masks)]
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


def _write_kept(path: Path, masks: BitMasks, weights: Mapping[str, Tensor]) -> Path:
    """Each tensor holds the kept weights of one matrix, row by row: (kept,)."""
    dtype = weights[next(iter(masks))].dtype
    kept = {name: ((masks.kept[name],), dtype) for name in masks}
    with TensorWriter(path, kept) as writer:
        for name in masks:
            writer.write(name, weights[name][masks[name]])
            heartbeat()
        writer.done()
    return path
