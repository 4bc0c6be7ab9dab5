"""The pruning stage of a cell: a model pruned in place, with statistics that a worker measures once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from torch import Tensor

from trainables.hardware import environment
from trainables.inputs import load_planned_calibration_text
from trainables.loaded import LoadedModel
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import RunError
from tune_sparse.evaluation.validation import mask_violations
from tune_sparse.ledger.contracts import RunStore
from tune_sparse.ledger.pruning_io import read_masks, read_weights
from tune_sparse.ledger.prunings import StoredPruning
from tune_sparse.ledger.run import Run
from tune_sparse.lora.merging import mask_weights_into
from tune_sparse.models.checkpoints import prunable_weights, write_weights_into
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.calibration import (
    CalibrationStats,
    ModelBlocks,
    count_tokens,
    example_windows,
    text_windows,
    tokens_per_input,
)
from tune_sparse.pruning.masks import MaskedWeights
from tune_sparse.pruning.methods import method_named
from tune_sparse.pruning.prune_into import Calibration, prune_into
from tune_sparse.pruning.prune_model import Prunable, measured
from tune_sparse.pruning.reconstruction import check_windows, reconstruct_into

TOKENS_SEEN, TOKENS_PER_INPUT = "calibration_tokens_seen", "calibration_tokens_per_input"
RECOVERY = "recovery"
ENDED_MASKS = "masks.safetensors"
"""In the folder of a run whose schedule changed its masks: those that it ended with, as bits."""


@dataclass(frozen=True)
class Pruned:
    """Masks, their checksum, and the weights that they leave, each made again when it is asked for."""

    masks: BitMasks
    checksum: str
    weights: Mapping[str, Tensor]
    calibration_tokens: int | None = None
    """that were seen; None for a method that is not calibrated"""
    recovery: Sequence[Mapping[str, Any]] = ()
    """`BlockRecovery` of each block of a recovered model"""

    @classmethod
    def from_masks(cls, masks: BitMasks, loaded: LoadedModel) -> Pruned:
        """By a method that updates no weight."""
        return cls(masks, masks.sha256, MaskedWeights(loaded.dense_weights, masks))

    def trained_to(self, masks: BitMasks) -> Pruned:
        """With the masks that its training ended with."""
        return replace(self, masks=masks, checksum=masks.sha256)

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
            "calibration": run.protocol.calibrated_by | self.tokens_seen() if run.is_calibrated else None,
            "recover": run.protocol.recover if run.is_recovered else None,
            "recovery": list(self.recovery),
            "pruning_id": run.pruning_id,
        }

    def tokens_seen(self) -> dict[str, int]:
        return {} if self.calibration_tokens is None else {TOKENS_SEEN: self.calibration_tokens}

    def calibration_metrics(self, run: Run, dims: ModelDims) -> dict[str, Any]:
        """What a table says of the calibration; nothing for a method that is not calibrated."""
        if self.calibration_tokens is None:
            return {}
        protocol = run.protocol
        chosen = {"calibration": protocol.calibration, "calibration_order": protocol.calibration_order}
        return chosen | self.tokens_seen() | {TOKENS_PER_INPUT: tokens_per_input(dims, self.calibration_tokens)}


def read_into(stored: StoredPruning, loaded: LoadedModel) -> Pruned:
    """Prune a model, which has its dense weights, in place as it is stored.

    Raises `NotReadyError` for bits that are not those stored.
    """
    masks, tokens = read_masks(stored, loaded.model.device), stored.provenance.get(TOKENS_SEEN)
    if not stored.has_weights:
        mask_weights_into(loaded.model, masks)
        return Pruned(masks, stored.mask_sha256, MaskedWeights(loaded.dense_weights, masks), tokens)
    weights = read_weights(stored, masks)
    write_weights_into(loaded.model, weights)
    return Pruned(masks, stored.mask_sha256, weights, tokens, stored.provenance.get(RECOVERY, ()))


class Pruner:
    """Prunes the model that a worker holds, and keeps what calibration measured on it."""

    def __init__(self) -> None:
        self._statistics: dict[tuple[Any, ...], CalibrationStats] = {}

    def prune_into(self, run: Run, loaded: LoadedModel, train: Sequence[Encoded], store: RunStore) -> Pruned:
        """Prune the model, which has its dense weights, in place: as stored, or as it is stored now.

        train: the task's training examples. Raises `RunError` for masks that break a rule, `NotReadyError` for a
        stored pruning that is not whole.
        """
        if run.pruning_id is None:
            return Pruned.from_masks(self.make_into(run, loaded, train), loaded)
        stored = store.pruning(run)
        if stored is None:
            seen: dict[str, Any] = {}
            if run.is_calibrated:
                examples = calibration_windows(run, loaded, train)
                seen |= {TOKENS_SEEN: count_tokens(examples)}
                if run.is_recovered:
                    check_windows(len(examples))
            masks = self.make_into(run, loaded, train)
            if run.is_recovered:
                seen |= {RECOVERY: recover_into(run, loaded, masks, train)}
            updated = prunable_weights(loaded.model) if run.updates_weights else None
            store.write_pruning(run, masks, updated, environment() | seen)
            stored = store.pruning(run)
            assert stored is not None
            if stored.mask_sha256 != masks.sha256:  # another worker was faster
                loaded.dense_weights.restore_into(loaded.model)
        return read_into(stored, loaded)

    def make_into(self, run: Run, loaded: LoadedModel, train: Sequence[Encoded]) -> BitMasks:
        """Prune the model in place by its run's method, whatever is stored. Raises as `prune_into`."""
        sparsity, seed = run.starting_sparsity, run.cell.seed
        calibration = self._calibration(run, loaded, train) if run.is_calibrated else None
        masks = prune_into(loaded.model, run.cell.method, loaded.dims, sparsity, seed, calibration)
        violations = mask_violations(masks, sparsity)
        if violations:
            raise RunError("masks must be valid: " + "; ".join(violations))
        return masks

    def _calibration(self, run: Run, loaded: LoadedModel, train: Sequence[Encoded]) -> Calibration:
        examples = calibration_windows(run, loaded, train)
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


def recover_into(run: Run, loaded: LoadedModel, masks: BitMasks, train: Sequence[Encoded]) -> list[dict[str, Any]]:
    """Recover the pruned model in place; returns the `BlockRecovery` of each block. Raises as `reconstruct_into`."""
    examples = calibration_windows(run, loaded, train)
    blocks = ModelBlocks(loaded.model)
    return [asdict(found) for found in reconstruct_into(blocks, loaded.dense_weights, masks, examples)]


def calibration_windows(run: Run, loaded: LoadedModel, train: Sequence[Encoded]) -> list[Encoded]:
    """Return what scores are calibrated on: training examples of the task, or a text."""
    protocol = run.protocol
    tokens, window = protocol.calibration_tokens, min(protocol.calibration_window, loaded.dims.max_positions)
    if protocol.calibration == "task":
        return example_windows(train, tokens, window)
    return text_windows(loaded.tokenizer, load_planned_calibration_text(run), tokens, window)
