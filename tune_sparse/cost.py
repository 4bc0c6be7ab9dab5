"""What inference costs: floating-point operations counted from the non-zeros that are left."""

from __future__ import annotations

from tune_sparse.masks import Masks
from tune_sparse.models import Shape

SEQUENCE_LENGTHS = (1024, 2048, 4096, 8192)
"""Tokens at which a run records its inference FLOPs."""


def attended_pairs(tokens: int, window: int | None) -> int:
    """(query, key) pairs of causal attention over `tokens`, each query looking back at most `window` tokens."""
    window = min(window or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def inference_flops(masks: Masks, shape: Shape, tokens: int) -> int:
    """Operations of one forward pass over `tokens`, a multiply-add counted as two.

    2 per token and kept weight of the pruned matrices and the head, and 4 per attended pair and channel of the
    heads that are left (QKᵀ and AV). Norms, softmax, rotary embeddings and the embedding look-up are left out
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, with the causal and sliding-window pairs counted exactly).
    """
    kept = sum(int(mask.sum()) for mask in masks.values())
    head = shape.hidden * shape.vocabulary
    channels = sum(
        int(mask.view(shape.heads, -1).any(dim=1).sum()) * shape.head_dim
        for name, mask in masks.items()
        if ".q_proj." in name
    )
    return 2 * tokens * (kept + head) + 4 * attended_pairs(tokens, shape.sliding_window) * channels
