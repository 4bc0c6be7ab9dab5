"""A model in memory pruned where it stands: one matrix after the other, and nothing of the model's size beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.data.splits import Encoded
from tune_sparse.models.architectures import read_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.calibration import CalibrationStats, ModelBlocks
from tune_sparse.pruning.masks import Masks, mask_into
from tune_sparse.pruning.methods import method_named
from tune_sparse.pruning.prune_model import (
    NO_STATISTICS,
    Prunable,
    PrunedMatrix,
    needs_blockwise,
    prune,
    prune_blockwise,
)
from tune_sparse.watchdog import heartbeat


@dataclass(frozen=True)
class Calibration:
    """The examples that scores are computed on, what was measured with them, and how they go through the blocks."""

    examples: Sequence[Encoded] = ()
    statistics: CalibrationStats = NO_STATISTICS
    is_sequential: bool = False


@torch.no_grad()
def prune_into(
    model: PreTrainedModel,
    method: str,
    dims: ModelDims,
    sparsity: float,
    seed: int = 0,
    calibration: Calibration | None = None,
    kept: Masks | None = None,
) -> BitMasks:
    """Prune the matrices of a model to one sparsity, in place, and return their masks.

    kept: masks that the model has already, which only lose weights. At sparsity 0 everything is kept, whatever the
    method. Raises as `prune`.
    """
    weights = read_weights(model)
    if sparsity == 0:
        return BitMasks.pack((name, torch.ones_like(own, dtype=torch.bool)) for name, own in weights.items())
    prunable = Prunable.from_weights(weights, dims)
    found = _pruned(model, prunable, method, sparsity, seed, calibration or Calibration(), kept)
    return BitMasks.pack(_write_into(weights, found, method_named(method).updates_weights))


def _pruned(
    model: PreTrainedModel,
    prunable: Prunable,
    method: str,
    sparsity: float,
    seed: int,
    calibration: Calibration,
    kept: Masks | None,
) -> Iterator[PrunedMatrix]:
    statistics, is_sequential = calibration.statistics, calibration.is_sequential
    if not needs_blockwise(method, is_sequential):
        return prune(method, prunable, [sparsity], seed, statistics, kept)
    blocks, examples = ModelBlocks(model), calibration.examples
    return prune_blockwise(method, prunable, blocks, examples, [sparsity], seed, statistics, is_sequential, kept)


def _write_into(
    weights: Mapping[str, Tensor], found: Iterable[PrunedMatrix], are_updated: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield each mask once its matrix is written. Matrices that are pruned together were all scored before."""
    for pruned in found:
        heartbeat()
        name, mask = pruned.name, pruned.keep(0)
        if are_updated:
            # Zeros without a sign, so that kept weights and mask say every bit.
            weights[name].copy_(pruned.weight(0).masked_fill_(~mask, 0))
        else:
            mask_into(weights[name], mask)
        del pruned  # or its factor would stay while the next one is made
        yield name, mask
