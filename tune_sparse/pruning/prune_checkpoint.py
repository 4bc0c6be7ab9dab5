"""Masks, statistics and histograms of one model: all methods, all levels, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from tune_sparse.config.cell import check_sparsities
from tune_sparse.config.protocol import RECOVERIES
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError, unknown_name
from tune_sparse.files import check_room, write_json
from tune_sparse.models.mdl_writer import check_writable, replace_by_mdl
from tune_sparse.models.safetensors_io import TensorWriter
from tune_sparse.pruning.calibration import CalibrationStats, calibration_line, count_tokens
from tune_sparse.pruning.compact import compact
from tune_sparse.pruning.mask_io import FORMATS, MaskFile, PtWriter, levels_writer, masks_writer, stem
from tune_sparse.pruning.mask_statistics import LevelStatistics, add_matrix
from tune_sparse.pruning.masks import mask_sha256
from tune_sparse.pruning.methods import method_named
from tune_sparse.pruning.prune_model import (
    PrunedMatrix,
    check_method_sparsities,
    measured,
    needs_blockwise,
    prune,
    prune_blockwise,
)
from tune_sparse.pruning.reconstruction import check_recoverable, check_windows
from tune_sparse.pruning.recover_checkpoint import recover_checkpoint
from tune_sparse.pruning.streaming import OpenCheckpoint, PrunedCheckpoint, StreamedBlocks, open_checkpoint
from tune_sparse.pruning.survival_map import MAX_LEVELS, pack

AHEAD_BYTES = 1 << 28
"""Larger matrices, and structured ones, which need several at once, are not made ahead: memory stays within three of
the largest tensor and 500 MB."""


@dataclass(frozen=True)
class Request:
    """A request to prune one model."""

    model: str
    methods: Sequence[str]
    sparsities: Sequence[float]
    """ascending, above 0"""
    out: Path
    seed: int = 0
    format: str = "safetensors"
    checkpoints: bool = False
    """Write each pruned checkpoint too."""
    mdl: bool = False
    """Write those as `.mdl` of Cerebras."""
    compact: bool = False
    """Write each structured checkpoint in its smaller form too."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """The settings that chose `examples`: recorded, not read."""
    examples: Sequence[Encoded] = ()
    sequential: bool = False
    recover: str = "none"
    """Write each pruned checkpoint with its kept weights recovered, too."""

    def __post_init__(self) -> None:
        check_sparsities(self.sparsities)
        if 0 in self.sparsities or any(a >= b for a, b in pairwise(self.sparsities)):
            raise InputError(f"sparsities must ascend from above 0, got {list(self.sparsities)}. Sort them.")
        if self.format not in FORMATS:
            raise unknown_name("format", self.format, FORMATS)
        if self.mdl and not self.checkpoints:
            raise InputError("--mdl says how pruned models are written, got no --checkpoints. Add it.")
        if len(self.sparsities) > MAX_LEVELS:
            raise InputError(f"one pass makes {MAX_LEVELS} levels, got {len(self.sparsities)}. Ask for fewer.")
        if self.recover not in RECOVERIES:
            raise unknown_name("recover", self.recover, RECOVERIES)
        if self.recovers and not self.checkpoints:
            raise InputError(f"--recover {self.recover} changes weights, and masks alone have none. Add --checkpoints.")
        for name in self.methods:
            method = method_named(name)
            check_recoverable(name, self.recover)
            if (method.is_calibrated or self.recovers) and not self.examples:
                needing = name if method.is_calibrated else f"--recover {self.recover}"
                raise InputError(f"{needing} needs calibration examples, got none. Give --calibration.")
            if self.sequential and method.is_calibrated and (method.needs.gradients or self.format == "levels"):
                raise InputError(
                    f"--sequential prunes block after block by their inputs, got {name} as {self.format}. "
                    "Leave it out, or choose wanda or sparsegpt with a file a level."
                )
            if self.recovers and self.format == "levels":
                raise InputError("recovery reads a file a level, got --format levels. Choose safetensors.")
            if self.format == "levels" and method.updates_weights:
                raise InputError(f"a survival map needs nested masks, those of {name} are not. Choose safetensors.")
            if self.compact and self.format == "levels":
                raise InputError(
                    "a smaller model is made from a file a level, got --format levels. Choose safetensors."
                )
            if self.compact and method.pattern != "structured":
                raise InputError(f"only structured masks make a model smaller, got {name}. Leave --compact out.")
        if self.recovers:
            check_windows(len(self.examples))

    @property
    def recovers(self) -> bool:
        return self.recover != "none"


def run(request: Request, report: Callable[[str], None] = print) -> Path:
    """Prune by every method of a request; returns the folder of the masks.

    Every file is written aside and takes its name when it is whole. Raises `InputError` for anything wrong with the
    input, at the latest when the tensor that is wrong is read.
    """
    checkpoint = open_checkpoint(request.model)
    if request.mdl:
        check_writable(checkpoint.tensors)
    for method in request.methods:
        check_method_sparsities(method, checkpoint.dims, request.sparsities)
    folder = request.out / checkpoint.name
    folder.mkdir(parents=True, exist_ok=True)
    _check_disk(request, checkpoint, folder)
    statistics = CalibrationStats()
    methods = [method_named(name) for name in request.methods]
    if any(method.needs.input_norms or method.needs.gradients for method in methods):
        blocks = StreamedBlocks(checkpoint, checkpoint.dtype)
        statistics = measured(methods, checkpoint.prunable, blocks, request.examples)
    for method in request.methods:
        # The inputs of a block depend on what was pruned before it: each level is calibrated for itself.
        passes = [[s] for s in request.sparsities] if _is_sequential(request, method) else [request.sparsities]
        for sparsities in passes:
            _write_method(request, method, sparsities, checkpoint, statistics, folder)
        if method_named(method).is_calibrated:
            report(calibration_line(method, checkpoint.dims, count_tokens(request.examples)))
        report(f"{method}: {len(request.sparsities)} levels in {folder}")
    return folder


def _is_sequential(request: Request, method: str) -> bool:
    return request.sequential and needs_blockwise(method, sequential=True)


def _check_disk(request: Request, checkpoint: OpenCheckpoint, folder: Path) -> None:
    weights = sum(checkpoint.prunable.sizes.values())
    files = len(request.methods) * len(request.sparsities)
    needed = len(request.methods) * weights // 2 if request.format == "levels" else files * weights
    whole = sum(path.stat().st_size for path in set(checkpoint.tensors.paths.values()))
    needed += files * whole * (request.checkpoints + request.compact + request.recovers)
    check_room(folder, needed, "pruning", "Free some, ask for fewer levels, or --format levels.")


def _pruned_matrices(
    request: Request, name: str, sparsities: Sequence[float], checkpoint: OpenCheckpoint, statistics: CalibrationStats
) -> Iterator[PrunedMatrix]:
    sequential = _is_sequential(request, name)
    if not needs_blockwise(name, sequential):
        found = prune(name, checkpoint.prunable, sparsities, request.seed, statistics)
        is_small = _largest_bytes(checkpoint) <= AHEAD_BYTES and method_named(name).pattern != "structured"
        return ahead(found) if is_small else found
    blocks = StreamedBlocks(checkpoint, checkpoint.dtype)
    return prune_blockwise(
        name, checkpoint.prunable, blocks, request.examples, sparsities, request.seed, statistics, sequential
    )


def _largest_bytes(checkpoint: OpenCheckpoint) -> int:
    sizes = checkpoint.prunable.sizes
    return max(size * checkpoint.tensors.dtypes[name].itemsize for name, size in sizes.items())


def ahead(items: Iterator[PrunedMatrix]) -> Iterator[PrunedMatrix]:
    """The same items, the next one made in a thread while this one is used: torch and the disk leave Python free."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _write_method(
    request: Request,
    method: str,
    sparsities: Sequence[float],
    checkpoint: OpenCheckpoint,
    statistics: CalibrationStats,
    folder: Path,
) -> None:
    shapes = {matrix.name: checkpoint.prunable.shapes[matrix.name] for matrix in checkpoint.prunable.matrices}
    metadata = {"tune_sparse.method": method, "tune_sparse.model": checkpoint.name}
    levels = [LevelStatistics(method, sparsity) for sparsity in sparsities]
    paths = [folder / f"{stem('masks', method, s)}.{request.format}" for s in sparsities]
    is_mdl = request.mdl and not request.recovers  # recovery reads what was pruned
    with contextlib.ExitStack() as stack:
        packed: TensorWriter | None = None
        masks: list[TensorWriter | PtWriter] = []
        if request.format == "levels":
            path = folder / f"{stem('levels', method)}.safetensors"
            packed = stack.enter_context(levels_writer(path, shapes, sparsities, metadata))
        else:
            masks = [masks_writer(path, shapes, metadata) for path in paths]
            for mask in masks:
                stack.enter_context(mask)
        weights = [
            stack.enter_context(PrunedCheckpoint(checkpoint, folder / stem("checkpoint", method, s), is_mdl))
            for s in sparsities
            if request.checkpoints
        ]
        for pruned in _pruned_matrices(request, method, sparsities, checkpoint, statistics):
            add_matrix(levels, pruned)
            if packed:
                packed.write(pruned.name, pack(_nested(method, pruned)))
            for number, mask in enumerate(masks):
                mask.write(pruned.name, pruned.keep(number))
            for number, weight in enumerate(weights):
                weight.write(pruned.name, pruned.weight(number))
        for writer in (*masks, *weights, *([packed] if packed else [])):
            writer.done()
    for level, path in zip(levels, paths, strict=True):
        _write_level(request, checkpoint, level, None if packed else path, folder)


def _nested(method: str, pruned: PrunedMatrix) -> Tensor:
    if pruned.levels is None:
        raise InputError(
            f"a survival map needs nested masks, those of {method} are not at these sparsities. Choose safetensors."
        )
    return pruned.levels


def _recover(
    request: Request, checkpoint: OpenCheckpoint, level: LevelStatistics, masks: Path, folder: Path
) -> list[dict[str, Any]]:
    pruned, recovered = (folder / stem(kind, level.method, level.sparsity) for kind in ("checkpoint", "recovered"))
    found = recover_checkpoint(checkpoint, pruned, masks, request.examples, recovered, request.mdl)
    if request.mdl:
        replace_by_mdl(pruned)
    return [asdict(block) for block in found]


def _write_level(
    request: Request, checkpoint: OpenCheckpoint, level: LevelStatistics, path: Path | None, folder: Path
) -> None:
    """Statistics, histogram and, where asked for, the smaller checkpoint of one level."""
    stats = level.as_json() | {"seed": request.seed, "format": request.format}
    stats["mask_sha256"] = mask_sha256(MaskFile(path)) if path else None
    if method_named(level.method).is_calibrated or request.recovers:
        stats["calibration"] = {**request.calibration, "calibration_tokens_seen": count_tokens(request.examples)}
    if request.recovers:
        assert path is not None
        stats["recovery"] = _recover(request, checkpoint, level, path, folder)
    write_json(folder / f"{stem('stats', level.method, level.sparsity)}.json", stats)
    level.draw(folder / f"{stem('histogram', level.method, level.sparsity)}.png")
    if request.compact:
        assert path is not None
        compact(checkpoint, MaskFile(path), folder / stem("compact", level.method, level.sparsity))
