"""Masks and pruned weights as plain tensors, all in memory beside the model: what small tests begin with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.calibration import CalibrationStats
from tune_sparse.pruning.masks import Masks
from tune_sparse.pruning.prune_model import NO_STATISTICS, Prunable, prune


def make_masks(
    method: str,
    weights: Mapping[str, Tensor],
    dims: ModelDims,
    sparsity: float,
    seed: int,
    statistics: CalibrationStats = NO_STATISTICS,
) -> Masks:
    """Keep-masks of a model's prunable weights. At sparsity 0 everything is kept, whatever the method."""
    if sparsity == 0:
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    model = Prunable.from_weights(weights, dims)
    masks = {pruned.name: pruned.keep(0) for pruned in prune(method, model, [sparsity], seed, statistics)}
    return {name: masks[name] for name in weights}


def masked(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Weights with zeros where a mask does not keep them."""
    return {name: weight * masks[name] for name, weight in weights.items()}
