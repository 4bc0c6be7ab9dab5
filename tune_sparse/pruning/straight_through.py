"""Layers that compute with W⊙M and pass the dense gradient dL/d(W⊙M) on to W: pruned weights are trained below their
mask (Bengio et al. 2013, arXiv:1308.3432; jaxpruner's straight-through estimators).

W⊙M is built for one layer at a time and again in its backward, so that nothing of the model's size is kept beside W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tune_sparse.models.architectures import Matrix


class StraightThrough:
    """The masked forward of one layer of a model, in place of its own until `end`.

    masks: looked up in every forward and backward; the caller may replace what is in it between two steps.
    """

    def __init__(self, model: nn.Module, matrix: Matrix, masks: Mapping[str, Tensor]) -> None:
        self._layer, self._matrix, self._masks = model.get_submodule(matrix.name.rpartition(".")[0]), matrix, masks
        self._layer.forward = self._forward

    def end(self) -> None:
        del self._layer.forward

    def effective(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W⊙M: (O, I)."""
        return self._matrix.oriented((weight * self._masks[self._matrix.name]).to(dtype))

    def weight_gradient(self, dY: Tensor, x: Tensor) -> Tensor:
        """dYᵀX in the checkpoint's layout. dY: (N, O), x: (N, I)."""
        return x.T @ dY if self._matrix.transposed else dY.T @ x

    def _forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y: Tensor = _MaskedLinear.apply(x.to(dtype), self._layer.weight, self)
        bias: Any = self._layer.bias
        return y if bias is None else y + bias.to(dtype)


class _MaskedLinear(torch.autograd.Function):
    """y = (W⊙M)x with dX = dY (W⊙M) and dW = dYᵀX, nothing of it masked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: StraightThrough) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, layer.effective(weight, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dX = dY @ ctx.layer.effective(weight, dY.dtype)
        gradient = ctx.layer.weight_gradient(dY.flatten(0, -2), x.flatten(0, -2))
        return dX, gradient.to(weight.dtype), None
