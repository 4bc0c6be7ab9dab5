"""Floating-point operations of inference and training, counted from the non-zeros that are left."""

from __future__ import annotations

from collections.abc import Sequence

from tune_sparse.models.architectures import architecture_named
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.masks import Masks, packed

SEQUENCE_LENGTHS = (1024, 2048, 4096, 8192)
"""Tokens at which a run records its inference FLOPs."""


def attended_pairs(tokens: int, window: int | None) -> int:
    """(query, key) pairs of causal attention over `tokens`, each query looking back at most `window` tokens."""
    window = min(window or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def inference_flops(masks: Masks, dims: ModelDims, tokens: int) -> int:
    """Operations of one forward pass over `tokens`, a multiply-add counted as two.

    2 per token and kept weight of the pruned matrices and the head, and 4 per attended pair and channel of the
    heads that are left (QKᵀ and AV). Norms, softmax, rotary embeddings and the embedding look-up are left out
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, with the causal and sliding-window pairs counted exactly).
    """
    head = dims.hidden_size * dims.vocab_size
    pairs = attended_pairs(tokens, dims.sliding_window)
    return 2 * tokens * (_kept_weights(masks) + head) + 4 * pairs * _kept_channels(masks, dims)


def training_flops(
    masks: Masks, dims: ModelDims, examples: Sequence[tuple[int, int]], factor_weights: int, kept: float | None = None
) -> int:
    """Operations of forward and backward over `examples`, each (tokens, target tokens).

    Forward and input gradient take 2 per token and kept weight each, attention three times its forward (Kaplan et al.
    2020, section 2.1), the head 4 per target token and weight. An unmasked update adds 6 per token and weight of its
    factors, R (I + O) a matrix; on a smaller model, of those that are left. A masked update, or a trained weight, adds
    2 per token and kept weight for the gradient there. What does not grow with the tokens is left out: building an
    effective weight, the optimizer.

    kept: the mean over the steps, where `masks` are those of a start and change.
    """
    kept, channels = _kept_weights(masks) if kept is None else kept, _kept_channels(masks, dims)
    tokens, targets = (sum(counts) for counts in zip(*examples, strict=True))
    pairs = sum(attended_pairs(length, dims.sliding_window) for length, _ in examples)
    update = 6 * factor_weights if factor_weights else 2 * kept
    matrices = round(tokens * (4 * kept + update))
    return matrices + 12 * pairs * channels + 4 * targets * dims.hidden_size * dims.vocab_size


def _kept_weights(masks: Masks) -> int:
    return sum(packed(masks).kept.values())


def _kept_channels(masks: Masks, dims: ModelDims) -> int:
    """Channels of the attention heads that are left, over all blocks."""
    queries = (
        matrix.oriented(masks[matrix.name])[: dims.query_rows]
        for matrix in architecture_named(dims.architecture).matrices(masks)
        if matrix.role in ("q", "qkv")
    )
    return sum(int(rows.reshape(dims.num_heads, -1).any(dim=1).sum()) * dims.head_dim for rows in queries)
