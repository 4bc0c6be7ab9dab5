"""The pruning methods of the matrix: each a score and a pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_sparse import scores
from tune_sparse.errors import unknown_name
from tune_sparse.masks import Masks, block_masks, keep_highest, pruned_count, structured_counts
from tune_sparse.models import Shape


@dataclass(frozen=True)
class Method:
    """score: importance of each weight. pattern: from weights and score to masks."""

    score: Callable[..., Tensor]
    pattern: Callable[[Callable[..., Tensor], Mapping[str, Tensor], Shape, float, int], Masks]


def elementwise(
    score: Callable[..., Tensor], weights: Mapping[str, Tensor], shape: Shape, sparsity: float, seed: int
) -> Masks:
    """The lowest scores of each matrix (O, I) go, the same fraction in every matrix.

    score(weight, name, seed) -> (O, I).
    """
    return {
        name: keep_highest(score(weight, name, seed), pruned_count(weight.numel(), sparsity))
        for name, weight in weights.items()
    }


def structured(
    score: Callable[..., Tensor], weights: Mapping[str, Tensor], shape: Shape, sparsity: float, seed: int
) -> Masks:
    """Whole key/value groups and feed-forward channels go, the same number in every block.

    score(*parts) -> (G,), each part (G, ...) with the weights of every group in one matrix. Raises `InputError` where
    groups and channels cannot come close enough to the sparsity.
    """
    groups, channels = structured_counts(shape, sparsity)
    blocks: dict[str, dict[str, str]] = {}
    for name in weights:
        block, _, layer, _ = name.rsplit(".", 3)
        blocks.setdefault(block, {})[layer] = name
    masks: Masks = {}
    for names in blocks.values():
        w = {layer: weights[name] for layer, name in names.items()}
        by_group = [w[layer].reshape(shape.key_value_heads, -1) for layer in ("q_proj", "k_proj", "v_proj")]
        by_group.append(w["o_proj"].T.reshape(shape.key_value_heads, -1))
        keep_groups = keep_highest(score(*by_group), groups)
        keep_channels = keep_highest(score(w["gate_proj"], w["up_proj"], w["down_proj"].T), channels)
        block_mask = block_masks(shape, keep_groups, keep_channels)
        masks |= {name: block_mask[layer] for layer, name in names.items()}
    return masks


METHODS = {
    "unstructured": Method(scores.magnitude, elementwise),
    "structured": Method(scores.group_norms, structured),
    "random": Method(scores.random, elementwise),
}


def make_masks(method: str, weights: Mapping[str, Tensor], shape: Shape, sparsity: float, seed: int) -> Masks:
    """Keep-masks of a model's prunable weights.

    At sparsity 0 everything is kept, whatever the method. Raises `InputError` for an unknown method.
    """
    if sparsity == 0:
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    chosen = METHODS[method]
    return chosen.pattern(chosen.score, weights, shape, sparsity, seed)
