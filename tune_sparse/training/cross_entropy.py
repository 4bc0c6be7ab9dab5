"""Cross-entropy of a large vocabulary, without the logits of all tokens in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**25
"""Logits computed at a time: 128 MiB in float32, a thousand tokens of a vocabulary of 32,000."""


def summed_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Σ -log softmax(head(h))[target] in float32. hidden: (T, H), targets: (T,).

    With a frozen head its gradient is computed on the way, chunk by chunk. A head that is trained takes all logits.
    """
    if head.weight.requires_grad:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    return _Chunked.apply(hidden.to(head.weight.dtype), head.weight, head.bias, targets)


class _Chunked(torch.autograd.Function):
    """With z the logits: d/dz = softmax(z) - onehot(target). The gradient of `hidden` is all that is saved."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for chunk in _chunks(len(hidden), len(weight)):
            logits = F.linear(hidden[chunk], weight, bias).float()
            loss += F.cross_entropy(logits, targets[chunk], reduction="sum")
            if gradient is not None:
                slope = logits.softmax(-1)
                slope[torch.arange(len(slope), device=slope.device), targets[chunk]] -= 1
                torch.mm(slope.to(weight.dtype), weight, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = ctx.saved_tensors
        return (dloss * gradient).to(gradient.dtype), None, None, None


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))
