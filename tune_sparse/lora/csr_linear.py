"""LoRA on a weight of which little is left, stored by rows (CSR): every operation touches the kept weights alone.

On a CPU through MKL, in float32 or float64. W: (O, I), x: (..., I).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK_TOKENS = 64
"""MKL is fastest while a block of the dense operand, (I, 64), stays in the second-level cache."""


class Csr(nn.Module):
    """y = (W + s(BA)⊙M) x + b, where BA is computed only at the places that M keeps, and so is its gradient.

    Keeps the kept weights, and for each its place in M and in Mᵀ.
    """

    name = "csr"
    values: Tensor
    order: Tensor

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__()
        number = torch.zeros(mask.shape, dtype=torch.int32)
        number[mask] = torch.arange(int(mask.sum()), dtype=torch.int32)
        self.register_buffer("values", weight[mask], persistent=False)
        self.register_buffer("order", number.T[mask.T], persistent=False)
        self._pattern, self._transposed_pattern = _pattern(mask), _pattern(mask.T)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        y = _Csr.apply(x, A, B, scaling, self)
        return y if bias is None else y + bias

    def mask(self, weight: Tensor) -> Tensor:
        return _csr(self._pattern, torch.ones_like(self.values)).to_dense().bool()

    def effective(self, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """W + s(BA)⊙M: CSR (O, I)."""
        return torch.sparse.sampled_addmm(_csr(self._pattern, self.values), B, A, alpha=scaling)

    def gradient(self, dY: Tensor, x: Tensor) -> Tensor:
        """(dYᵀx)⊙M: CSR (O, I). dY: (T, O), x: (T, I)."""
        nothing = _csr(self._pattern, torch.zeros_like(self.values))
        return torch.sparse.sampled_addmm(nothing, dY.T, x)

    def transposed(self, matrix: Tensor) -> Tensor:
        """The transpose of a matrix with the places of M: CSR (I, O)."""
        return _csr(self._transposed_pattern, matrix.values().index_select(0, self.order))


class _Csr(torch.autograd.Function):
    """With G = (dYᵀx)⊙M: dX = dY W_eff, dB = s G Aᵀ, dA = s Bᵀ G."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, way: Csr) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.scaling, ctx.way = scaling, way
        return _product(x, way.effective(A, B, scaling))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        way, dX = ctx.way, None
        if ctx.needs_input_grad[0]:
            dX = _product(dY, way.transposed(way.effective(A, B, ctx.scaling)))
        G = way.gradient(dY.flatten(0, -2), x.flatten(0, -2))
        return dX, ctx.scaling * (way.transposed(G) @ B).T, ctx.scaling * (G @ A.T), None, None


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x matrixᵀ, densely. x: (..., I), matrix: CSR (O, I); the result is (..., O)."""
    rows = x.flatten(0, -2)
    y = x.new_empty(len(rows), len(matrix))
    for start in range(0, len(rows), BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        y[block] = (matrix @ rows[block].T).T
    return y.view(*x.shape[:-1], len(matrix))


def _pattern(mask: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """(starts of the rows, column of each place, shape) of M: (O, I)."""
    with _no_beta_warning():
        kept = mask.to_sparse_csr()
    return kept.crow_indices().int(), kept.col_indices().int(), mask.shape


def _csr(pattern: tuple[Tensor, Tensor, torch.Size], values: Tensor) -> Tensor:
    starts, columns, shape = pattern
    with _no_beta_warning():
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


class _no_beta_warning(warnings.catch_warnings):  # noqa: N801
    """torch says once in a process that CSR tensors may change."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
