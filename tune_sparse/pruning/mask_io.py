"""Keep-masks on disk: one file a level, or all nested levels in one packed map. docs/masks.md is the specification."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.files import atomic_file, read_json
from tune_sparse.models.safetensors_io import TensorFiles, TensorWriter
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.survival_map import unpack
from tune_sparse.watchdog import heartbeat

FORMATS = ("safetensors", "pt", "levels")
LEVELS = "tune_sparse.levels"
"""Metadata of a packed survival map: its sparsities."""
SHAPES = "tune_sparse.shapes"


def stem(kind: str, method: str, sparsity: float | None = None) -> str:
    """`{kind}_sparsity{XX}_{method}`, safe as a file name; settings are never read back from it."""
    level = "" if sparsity is None else f"sparsity{round(sparsity * 100, 6):02g}_"
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{kind}_{level}{method}")


def levels_writer(
    path: Path, shapes: Mapping[str, Sequence[int]], sparsities: Sequence[float], metadata: Mapping[str, str]
) -> TensorWriter:
    """Writes packed survival maps of all matrices."""
    described = {LEVELS: json.dumps(list(sparsities)), SHAPES: json.dumps({k: list(v) for k, v in shapes.items()})}
    packed = {name: ([(torch.Size(shape).numel() + 1) // 2], torch.uint8) for name, shape in shapes.items()}
    return TensorWriter(path, packed, {**metadata, **described})


class PtWriter:
    """Writes for `torch.load`: a dict of all masks, which are in memory together until `done`."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path, self._masks = path, dict.fromkeys(names, torch.empty(0))

    def write(self, name: str, mask: Tensor) -> None:
        self._masks[name] = mask

    def done(self) -> None:
        with atomic_file(self._path) as partial:
            torch.save(self._masks, partial)

    def __enter__(self) -> PtWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to remove: the file is written in `done` alone."""


def masks_writer(
    path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]
) -> TensorWriter | PtWriter:
    """Writes the masks of all matrices at one level, as the name of the file says."""
    if path.suffix == ".pt":
        return PtWriter(path, shapes)
    return TensorWriter(path, {name: (shape, torch.bool) for name, shape in shapes.items()}, metadata)


class MaskFile(Mapping[str, Tensor]):
    """The masks of one level, each read when it is asked for.

    A mask that is stored as numbers is given as it is: only `validate` may say whether it is binary.
    """

    def __init__(self, path: Path, sparsity: float | None = None) -> None:
        """sparsity: which level of a packed map. Raises `InputError` for a file that holds no masks."""
        if not path.is_file():
            raise InputError(f"a mask is a file, {path} is none. Give masks_sparsity*.safetensors, .pt, or levels_*.")
        self._level: int | None = None
        if path.suffix == ".pt":
            self._tensors: Mapping[str, Tensor] = _load_pt(path)
            self.shapes = {name: tuple(mask.shape) for name, mask in self._tensors.items()}
            return
        files = TensorFiles([path])
        self._tensors, self.shapes = files, files.shapes
        metadata = files.metadata()
        if LEVELS in metadata:
            sparsities: list[float] = json.loads(metadata[LEVELS])
            if sparsity not in sparsities:
                known = ", ".join(f"{s:g}" for s in sparsities)
                raise InputError(f"{path} has the sparsities {known}, got {sparsity}. Give one of them.")
            self._level = sparsities.index(sparsity)
            self.shapes = {name: tuple(shape) for name, shape in json.loads(metadata[SHAPES]).items()}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        return stored if self._level is None else unpack(stored, self.shapes[name]) > self._level

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_bits(path: Path, masks: BitMasks) -> Path:
    """Write masks as bits, one tensor a matrix."""
    shapes = {SHAPES: json.dumps({name: list(shape) for name, shape in masks.shapes.items()})}
    bits = {name: (tuple(packed.shape), torch.uint8) for name, packed in masks.bits.items()}
    with TensorWriter(path, bits, shapes) as writer:
        for name, packed in masks.bits.items():
            writer.write(name, packed)
            heartbeat()
        writer.done()
    return path


def read_bits(path: Path, device: torch.device) -> BitMasks:
    """Read what `write_bits` wrote. Raises `InputError` for another file."""
    files = TensorFiles([path])
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(files.metadata()[SHAPES]).items()}
        packed = {name: files[name].to(device, copy=True) for name in shapes}
    except (ValueError, LookupError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} must hold masks as bits, it has no shapes ({why}). Make it again.") from error
    return BitMasks.from_bits(packed, shapes)


def _load_pt(path: Path) -> dict[str, Tensor]:
    try:
        masks: Any = torch.load(path, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each have their own
        why = str(error).partition(". ")[0]  # the rest of what torch says is how to run code that the file brings
        raise InputError(f"{path} must be a file of tensors and nothing else: {why}. Make it again.") from error
    if not isinstance(masks, dict) or not all(isinstance(mask, Tensor) for mask in masks.values()):
        raise InputError(f"{path} must map tensor names to masks, got {type(masks).__name__}. Make it again.")
    return masks


def recorded_statistics(masks: Path) -> dict[str, Any]:
    """Read what `prune` recorded beside a mask file; empty if the masks come from elsewhere."""
    path = masks.with_name(f"{masks.stem.replace('masks_', 'stats_', 1)}.json")
    return read_json(path) if path != masks and path.is_file() else {}


def check_same_model(masks: MaskFile, tensors: TensorFiles, path: Path) -> None:
    """Raise `InputError` where a mask belongs to another model, naming the first tensor that differs."""
    for name in sorted(masks):
        if name not in tensors:
            raise InputError(f"a mask must be of the same model: {name} is in {path} and not in the checkpoint.")
        if masks.shapes[name] != tensors.shapes[name]:
            raise InputError(
                f"a mask must be of the same model: {name} is {masks.shapes[name]} in {path} and "
                f"{tensors.shapes[name]} in the checkpoint."
            )
