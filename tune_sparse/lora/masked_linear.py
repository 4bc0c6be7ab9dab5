"""y = (W + s(BA)⊙M) x for a frozen, pruned W: the effective weight, and two implementations.

W: (O, I) and 0 wherever M is; A: (R, I) and B: (O, R) in float32, rounded to the precision of W where they are used;
s = alpha / R; x: (..., I). An implementation is a module: what it keeps moves with the model. None holds a parameter.

| implementation | masks | what a step costs |
| --- | --- | --- |
| plain | none | two GEMMs, as LoRA |
| effective-weight | any | three GEMMs, and the weight built twice in a workspace that all layers share, or kept |
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from tune_sparse.errors import InputError

CHUNK_BYTES = 2**20
"""A CPU masks a weight in chunks of rows that stay in its cache between two operations."""


class Workspace:
    """Buffers of the size of a weight, used by one layer at a time and grown to the largest."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.device, torch.Size], Tensor] = {}

    def get(self, use: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a matrix of the shape and kind of `like`, holding anything, until the next call for the same use."""
        key, shape = (use, dtype or like.dtype, like.device), like.shape
        if (*key, shape) not in self._views:
            if key not in self._buffers or self._buffers[key].numel() < like.numel():
                self._buffers[key] = like.new_empty(like.numel(), dtype=dtype)
                self._views = {of: view for of, view in self._views.items() if of[:3] != key}
            self._views[(*key, shape)] = self._buffers[key][: like.numel()].view(shape)
        return self._views[(*key, shape)]

    def product_into(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """a b, rounded once to the dtype of `out`; through float32 where a CPU is faster in it."""
        if not _is_faster_in_float32(out):
            return torch.mm(a, b, out=out)
        wide = (self.get(use, t, torch.float32).copy_(t) for use, t in (("a", a), ("b", b)))
        return out.copy_(torch.mm(*wide, out=self.get("product", out, torch.float32)))


def _is_faster_in_float32(matrix: Tensor) -> bool:
    """A CPU without bfloat16 instructions multiplies bfloat16 matrices five times slower than float32 ones."""
    return matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and not _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return found["architecture"] != "x86_64" or bool(found["avx512_bf16"] or found["amx_bf16"])


@torch.no_grad()
def effective_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """W + s(BA), or W + s(BA)⊙M with the mask that W was pruned with, in the dtype of W: (O, I).

    The factors are rounded to that dtype once, their product and the sum are not rounded in between.
    """
    return EffectiveWeight(weight, mask, Workspace()).build(weight, A, B, scaling, torch.empty_like(weight))


def _rounded(A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sB and A in `dtype`."""
    return (scaling * B).to(dtype), A.to(dtype)


class Plain(nn.Module):
    """y = Wx + b + sB(Ax), as LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

    name = "plain"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        B, A = _rounded(A, B, scaling, weight.dtype)
        base = F.linear(x, weight, bias)
        return torch.addmm(base.flatten(0, -2), F.linear(x, A).flatten(0, -2), B.T).view(base.shape)

    def mask(self, weight: Tensor) -> Tensor | None:
        return None


class EffectiveWeight(nn.Module):
    """y = W_eff x + b with W_eff = W + s(BA)⊙M as a dense matrix, which is what is merged: the same bits.

    M is W != 0, and nothing of the size of W is kept: W_eff lies in the workspace only while it is used, or from the
    first forward of an optimizer step to its end (`keep_for_steps`). Kept weights that are exactly zero are remembered
    by their positions. Without a mask W_eff = W + sBA.
    """

    name = "effective-weight"
    kept_zeros: Tensor

    def __init__(self, weight: Tensor, mask: Tensor | None, workspace: Workspace) -> None:
        super().__init__()
        self.is_masked, self.workspace = mask is not None, workspace
        self.is_kept_for_steps = False
        self.of_step: Tensor | None = None
        """W_eff, where it is kept and was built in this optimizer step"""
        empty = torch.zeros(0, dtype=torch.long, device=weight.device)
        kept_zeros = empty if mask is None else (mask & (weight == 0)).flatten().nonzero().flatten()
        self.register_buffer("kept_zeros", kept_zeros, persistent=False)
        # A chunk of W is some rows that fit into the processor's cache. kept_zeros count over all of W, and chunk i has
        # kept_zeros[cuts[i] : cuts[i + 1]]. With rows of 4 weights in chunks of 2 rows, kept zeros at 3, 9, 10 are cut
        # at 0, 1, 3: the first chunk has the one at 3, the second those at 9 - 8 and 10 - 8 of its own.
        rows, width = weight.shape
        self._rows = rows if weight.device.type != "cpu" else max(1, CHUNK_BYTES // (width * weight.element_size()))
        starts = torch.arange(0, rows + self._rows, self._rows)
        self._cuts = torch.searchsorted(kept_zeros.cpu(), starts * width).tolist() if len(kept_zeros) else []

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        if self.is_kept_for_steps and self.of_step is None and torch.is_grad_enabled():
            with torch.no_grad():
                self.of_step = self.build(weight, A, B, scaling, torch.empty_like(weight))
        return _EffectiveWeight.apply(x, weight, bias, A, B, scaling, self)

    def effective(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """W + s(BA)⊙M as it was kept, or built in the workspace: the same bits. (O, I)"""
        if self.of_step is not None:
            return self.of_step
        return self.build(weight, A, B, scaling, self.workspace.get("weight", weight))

    def mask(self, weight: Tensor) -> Tensor | None:
        if not self.is_masked:
            return None
        return (weight != 0).flatten().index_fill(0, self.kept_zeros, True).view(weight.shape)

    def build(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float, out: Tensor) -> Tensor:
        """Compute W + s(BA)⊙M in `out`: (O, I)."""
        B, A = _rounded(A, B, scaling, weight.dtype)
        if not self.is_masked:
            return torch.addmm(weight, B, A, out=out)
        for i, (to, chunk, rows) in enumerate(zip(*map(self._chunks, (out, weight, B)), strict=True)):
            torch.addmm(chunk, rows, A, out=to).mul_(self._kept(i, chunk))
        return out

    def weight_gradient(self, weight: Tensor, dY: Tensor, x: Tensor) -> Tensor:
        """(dYᵀX)⊙M, in the workspace, where it takes the place of the effective weight: (O, I)."""
        out = self.workspace.get("weight", weight)
        self.workspace.product_into(out, dY.T, x)
        if self.is_masked:
            for i, (to, chunk) in enumerate(zip(self._chunks(out), self._chunks(weight), strict=True)):
                to.mul_(self._kept(i, chunk))
        return out

    def _chunks(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return matrix.split(self._rows) if len(matrix) > self._rows else (matrix,)

    def _kept(self, i: int, chunk: Tensor) -> Tensor:
        """The rows of M that are those of the i-th chunk of W, as numbers: to multiply by numbers of the same dtype is
        ten times faster than by bools, or `masked_fill_`."""
        keep = torch.ne(chunk, 0, out=self.workspace.get("mask", chunk))
        if self._cuts and self._cuts[i] < self._cuts[i + 1]:
            places = self.kept_zeros[self._cuts[i] : self._cuts[i + 1]] - i * self._rows * chunk.shape[1]
            keep.view(-1)[places] = 1
        return keep


class _EffectiveWeight(torch.autograd.Function):
    """With G = (dYᵀX)⊙M: dX = dY W_eff, db = Σ dY, dB = s G Aᵀ, dA = s Bᵀ G. Only x is saved; a W_eff that is not
    kept is built again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        impl: EffectiveWeight,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.scaling, ctx.impl = scaling, impl
        return F.linear(x, impl.effective(weight, A, B, scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        impl, dX, rows = ctx.impl, None, dY.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            dX = x.new_empty(x.shape)
            W_eff = impl.effective(weight, A, B, ctx.scaling)
            impl.workspace.product_into(dX.view(-1, x.shape[-1]), rows, W_eff)
        G = impl.weight_gradient(weight, rows, x.flatten(0, -2))
        sB, rounded_A = _rounded(A, B, ctx.scaling, weight.dtype)
        dA, dB = sB.T @ G, ctx.scaling * (G @ rounded_A.T)
        dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dX, None, dbias, dA.to(A.dtype), dB.to(B.dtype), None, None


def keep_for_steps(model: nn.Module, optimizer: Optimizer) -> None:
    """From here on, every layer of `model` builds its effective weight once in each step of `optimizer`.

    That takes a second copy of the adapted weights, from the first forward of a step until the optimizer has stepped.
    """
    impls = [module for module in model.modules() if isinstance(module, EffectiveWeight)]
    for impl in impls:
        impl.is_kept_for_steps = True

    def forget(*_: Any) -> None:
        for impl in impls:
            impl.of_step = None

    optimizer.register_step_post_hook(forget)


LoraImpl = Plain | EffectiveWeight


def choose_impl(
    weight: Tensor, mask: Tensor | None, rank: int, workspace: Workspace, requested: str = "auto"
) -> LoraImpl:
    """Choose how to compute with a pruned weight and its keep-mask, both (O, I), by what was counted and measured
    (docs/lora.md).

    `requested` forces the implementation of a masked layer. Raises `InputError` for a mask that the weight was not
    pruned with.
    """
    if mask is not None:
        _check_mask_fits(weight, mask)
    is_masked = mask is not None and (requested == "effective-weight" or not mask.all())
    if is_masked or not _pays_by_factors(len(weight), weight.shape[1], rank):
        return EffectiveWeight(weight, mask, workspace)
    return Plain()


def _pays_by_factors(rows: int, columns: int, rank: int) -> bool:
    """True if B(Ax) is cheaper than (BA)x in training, forward and backward.

    The factors take 6 R (I + O) operations a token, the gradient of their product 2 I O; but matrices as thin as the
    factors are multiplied at about a third of the speed.
    """
    return rows * columns >= 10 * rank * (rows + columns)


def _check_mask_fits(weight: Tensor, mask: Tensor) -> None:
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise InputError(
            f"a mask must be bool and have the shape of its weight, {tuple(weight.shape)}, got "
            f"{str(mask.dtype)[6:]} {tuple(mask.shape)}. Give the mask that this weight was pruned with."
        )
    filled = int((~mask & (weight != 0)).sum())
    if filled:
        raise InputError(
            f"a masked layer computes on a pruned weight, which is 0 where its mask is, got {filled} other values "
            "there. Give the pruned weight, or the mask that it was pruned with."
        )
