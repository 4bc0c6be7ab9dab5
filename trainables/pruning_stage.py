"""The pruning stage of a cell: masks and pruned weights, with statistics that a worker measures once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainables.inputs import load_planned_calibration_text
from trainables.loaded import LoadedModel
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import RunError
from tune_sparse.evaluation.validation import mask_violations
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.calibration import CalibrationStats, ModelBlocks, checked_examples, text_examples
from tune_sparse.pruning.masks import Masks, count_sparsity, mask_sha256, masked
from tune_sparse.pruning.methods import method_named
from tune_sparse.pruning.prune_model import (
    NO_STATISTICS,
    Prunable,
    make_masks,
    measured,
    needs_blockwise,
    prune_blockwise,
)


@dataclass(frozen=True)
class Pruned:
    """Masks, their checksum, and the weights that they leave."""

    masks: Masks
    checksum: str
    weights: dict[str, Tensor]

    def sparse_config(self, run: Run) -> dict[str, Any]:
        """The content of `sparse_config.json`."""
        return {
            "method": run.cell.method,
            "sparsity": run.cell.sparsity,
            "seed": run.cell.seed,
            "mask_sha256": self.checksum,
            "actual_sparsity": count_sparsity(self.masks),
            "kept_by_matrix": {name: [int(mask.sum()), mask.numel()] for name, mask in self.masks.items()},
            "calibration": run.protocol.calibrated_by if run.is_calibrated else None,
        }


class Pruner:
    """Prunes the model that a worker holds, and keeps what calibration measured on it."""

    def __init__(self) -> None:
        self._statistics: dict[tuple[Any, ...], CalibrationStats] = {}

    def prune(self, run: Run, loaded: LoadedModel, train: Sequence[Encoded]) -> Pruned:
        """Masks and pruned weights. The model may be left half-pruned: the caller writes the weights into it.

        train: the task's training examples. Raises `RunError` for masks that break a rule.
        """
        method, sparsity, seed = run.cell.method, run.cell.sparsity, run.cell.seed
        examples = calibration_examples(run, loaded, train) if run.is_calibrated else []
        statistics = self._measured(run, loaded, examples) if run.is_calibrated else NO_STATISTICS
        sequential = run.protocol.calibration_order == "sequential"
        if sparsity and needs_blockwise(method, sequential):
            model, blocks = Prunable.from_weights(loaded.dense_weights, loaded.dims), ModelBlocks(loaded.model)
            found = list(prune_blockwise(method, model, blocks, examples, [sparsity], seed, statistics, sequential))
            masks: Masks = {matrix.name: matrix.keep(0) for matrix in found}
            weights = {matrix.name: matrix.weight(0) for matrix in found}
        else:
            masks = make_masks(method, loaded.dense_weights, loaded.dims, sparsity, seed, statistics)
            weights = masked(loaded.dense_weights, masks)
        violations = mask_violations(masks, sparsity)
        if violations:
            raise RunError("masks must be valid: " + "; ".join(violations))
        return Pruned(masks, mask_sha256(masks), weights)

    def _measured(self, run: Run, loaded: LoadedModel, examples: Sequence[Encoded]) -> CalibrationStats:
        """Measure what the run's method uses of its calibration examples, once on the dense model."""
        method, protocol = method_named(run.cell.method), run.protocol
        inputs = (run.cell.task, run.data_fingerprint, run.prompt_version, run.calibration_fingerprint)
        needs = (method.needs.input_norms, method.needs.gradients, method.allocation == "owl")
        key = (*inputs, *needs, protocol.max_tokens, *protocol.calibrated_by.values())
        if key not in self._statistics:
            model = Prunable.from_weights(loaded.dense_weights, loaded.dims)
            self._statistics[key] = measured([method], model, ModelBlocks(loaded.model), examples)
        return self._statistics[key]


def calibration_examples(run: Run, loaded: LoadedModel, train: Sequence[Encoded]) -> list[Encoded]:
    """Return what scores are calibrated on: training examples of the task, or pieces of a text."""
    protocol = run.protocol
    if protocol.calibration == "task":
        return checked_examples(train, protocol.calibration_examples)
    tokens = min(protocol.calibration_tokens, loaded.dims.max_positions)
    return text_examples(loaded.tokenizer, load_planned_calibration_text(run), protocol.calibration_examples, tokens)
