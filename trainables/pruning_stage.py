"""The pruning stage of a cell: a model pruned in place, with statistics that a worker measures once."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainables.inputs import load_planned_calibration_text
from trainables.loaded import LoadedModel
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import RunError
from tune_sparse.evaluation.validation import mask_violations
from tune_sparse.files import cache_dir
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.models.safetensors_io import TensorFiles, TensorWriter
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.calibration import CalibrationStats, ModelBlocks, checked_examples, text_examples
from tune_sparse.pruning.methods import method_named
from tune_sparse.pruning.prune_into import Calibration, prune_into
from tune_sparse.pruning.prune_model import Prunable, measured


@dataclass(frozen=True)
class Pruned:
    """Masks, their checksum, and the weights that they leave, each made again when it is asked for."""

    masks: BitMasks
    checksum: str
    weights: Mapping[str, Tensor]

    def sparse_config(self, run: Run) -> dict[str, Any]:
        """The content of `sparse_config.json`."""
        kept, shapes = self.masks.kept, self.masks.shapes
        return {
            "method": run.cell.method,
            "sparsity": run.cell.sparsity,
            "seed": run.cell.seed,
            "mask_sha256": self.checksum,
            "actual_sparsity": self.masks.sparsity,
            "kept_by_matrix": {name: [kept[name], prod(shapes[name])] for name in self.masks},
            "calibration": run.protocol.calibrated_by if run.is_calibrated else None,
        }


@dataclass(frozen=True)
class MaskedWeights(Mapping[str, Tensor]):
    """{matrix: W⊙M}, made of a dense weight and a mask when it is asked for."""

    dense: Mapping[str, Tensor]
    masks: BitMasks

    def __getitem__(self, name: str) -> Tensor:
        return self.dense[name].mul_(self.masks[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)


class UpdatedWeights(Mapping[str, Tensor]):
    """{matrix: its weight as a method left it}: those kept are written to a file, and read when they are asked for."""

    def __init__(self, weights: Mapping[str, Tensor], masks: BitMasks) -> None:
        """weights: zero where a mask does not keep them."""
        self._masks = masks
        cache_dir().mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="kept-", dir=cache_dir())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / "weights.safetensors"
        with TensorWriter(path, {name: ((masks.kept[name],), weights[name].dtype) for name in masks}) as writer:
            for name, mask in masks.items():
                writer.write(name, weights[name][mask])
            writer.done()
        self._kept = TensorFiles([path])

    def __getitem__(self, name: str) -> Tensor:
        mask = self._masks[name]
        kept = self._kept[name].to(mask.device)
        return torch.zeros(mask.shape, dtype=kept.dtype, device=mask.device).masked_scatter_(mask, kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


class Pruner:
    """Prunes the model that a worker holds, and keeps what calibration measured on it."""

    def __init__(self) -> None:
        self._statistics: dict[tuple[Any, ...], CalibrationStats] = {}

    def prune_into(self, run: Run, loaded: LoadedModel, train: Sequence[Encoded]) -> Pruned:
        """Prune the model, which has its dense weights, in place.

        train: the task's training examples. Raises `RunError` for masks that break a rule.
        """
        method, sparsity, model = run.cell.method, run.cell.sparsity, loaded.model
        calibration = self._calibration(run, loaded, train) if run.is_calibrated else None
        masks = prune_into(model, method, loaded.dims, sparsity, run.cell.seed, calibration)
        violations = mask_violations(masks, sparsity)
        if violations:
            raise RunError("masks must be valid: " + "; ".join(violations))
        if sparsity and method_named(method).updates_weights:
            return Pruned(masks, masks.sha256, UpdatedWeights(prunable_weights(model), masks))
        return Pruned(masks, masks.sha256, MaskedWeights(loaded.dense_weights, masks))

    def _calibration(self, run: Run, loaded: LoadedModel, train: Sequence[Encoded]) -> Calibration:
        examples = calibration_examples(run, loaded, train)
        statistics = self._measured(run, loaded, examples)
        return Calibration(examples, statistics, run.protocol.calibration_order == "sequential")

    def _measured(self, run: Run, loaded: LoadedModel, examples: Sequence[Encoded]) -> CalibrationStats:
        """Measure what the run's method uses of its calibration examples, once on the dense model.

        Norms are small and stay; sums of gradients are as large as the model, and stay until others are measured.
        """
        method, protocol = method_named(run.cell.method), run.protocol
        inputs = (run.cell.task, run.data_fingerprint, run.prompt_version, run.calibration_fingerprint)
        needs = (method.needs.input_norms, method.needs.gradients, method.allocation == "owl")
        key = (*inputs, *needs, protocol.max_tokens, *protocol.calibrated_by.values())
        if key not in self._statistics:
            if method.needs.gradients:
                self._statistics = {k: found for k, found in self._statistics.items() if not found.gradients}
            model = Prunable.from_weights(prunable_weights(loaded.model), loaded.dims)
            self._statistics[key] = measured([method], model, ModelBlocks(loaded.model), examples)
        return self._statistics[key]


def calibration_examples(run: Run, loaded: LoadedModel, train: Sequence[Encoded]) -> list[Encoded]:
    """Return what scores are calibrated on: training examples of the task, or pieces of a text."""
    protocol = run.protocol
    if protocol.calibration == "task":
        return checked_examples(train, protocol.calibration_examples)
    tokens = min(protocol.calibration_tokens, loaded.dims.max_positions)
    return text_examples(loaded.tokenizer, load_planned_calibration_text(run), protocol.calibration_examples, tokens)
