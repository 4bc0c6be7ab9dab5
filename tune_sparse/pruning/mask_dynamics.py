"""The history of masks that change: what was pruned, came back or stayed, counted from bits.

A weight is zero where its mask says so: a kept weight that is exactly 0 counts as kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tune_sparse.models.architectures import matrix_named

RANK_THRESHOLD = 0.01
"""Singular values above this share of the largest count as rank."""


def popcount(bits: Tensor) -> Tensor:
    """The number of ones of packed bits, on their device: a scalar of int64."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(dtype=torch.int64)


@dataclass(frozen=True)
class History:
    """The past of the mask of one matrix, in packed bits in which padding is 0, and which nobody changes in place."""

    kept: Tensor
    """where the mask kept at the last record"""
    revived: Tensor
    """which weights were ever zero at one record and kept at the next"""
    zero_since: tuple[Tensor, ...] = ()
    """the step since which a weight is zero, in binary: the bits of its lowest digit, of the next, ...; on the host"""


def begin_history(kept: Tensor) -> History:
    """The history before the first step of a training, in which every zero is one since step 0."""
    return History(kept, torch.zeros_like(kept))


def continue_history(history: History, kept: Tensor, step: int) -> tuple[History, Tensor]:
    """The history with one more record, and counts of it: (3,), on the device of `kept`.

    The counts are of weights that revived, that either record keeps, and that this one keeps or that ever revived:
    the weights without the latter two are the zeros at both records, and the zeros now that never revived.
    Only the bits of what became zero leave the device.
    """
    before, ever = history.kept.to(kept.device), history.revived.to(kept.device)
    back = kept & ~before
    ever = ever | back
    counts = [popcount(back), popcount(kept | before), popcount(kept | ever)]
    gone = (before & ~kept).cpu()
    return History(kept, ever, _stamped(history.zero_since, gone, step)), torch.stack(counts)


def _stamped(digits: tuple[Tensor, ...], chosen: Tensor, step: int) -> tuple[Tensor, ...]:
    """Digits of steps in which the `chosen` weights have `step`."""
    if not chosen.any():
        return digits
    digits += (torch.zeros_like(chosen),) * (step.bit_length() - len(digits))
    return tuple(old | chosen if step >> i & 1 else old & ~chosen for i, old in enumerate(digits))


def summed_zero_since(history: History) -> int:
    """The sum, over the weights that are zero now, of the step since which they are."""
    zero = ~history.kept.cpu()
    return sum(int(popcount(digit & zero)) << i for i, digit in enumerate(history.zero_since))


def dead_counts(name: str, mask: Tensor) -> Tensor:
    """(outputs, inputs) of a matrix of which the mask keeps nothing: (2,), on its device.

    name: the checkpoint's tensor, which says whether it is stored transposed (Conv1D).
    """
    oriented = oriented_as_linear(name, mask)
    return torch.stack([(~oriented.any(1)).sum(), (~oriented.any(0)).sum()])


def oriented_as_linear(name: str, tensor: Tensor) -> Tensor:
    """(O, I) from the layout of the checkpoint's tensor of this name: the same data."""
    matrix = matrix_named(name)
    return tensor if matrix is None else matrix.oriented(tensor)


def masked_gradient_norm(gradient: Tensor, mask: Tensor) -> Tensor:
    """‖G[~M]‖₂ of a dense gradient, on its device."""
    return torch.linalg.vector_norm(gradient.masked_fill(mask, 0), dtype=torch.float32).double()


def zero_gradient_norms(norms: Mapping[str, float], zeros: Mapping[str, int]) -> dict[str, float]:
    """‖G[~M]‖₂/√zeros of each matrix, and of all `average` = Σ‖·‖/Σ zeros and `rms` = √(Σ‖·‖²/Σ zeros).

    Both are 0 where nothing is zero.
    """
    own = {f"zero_grad_norm/{name}": norm / max(1, zeros[name]) ** 0.5 for name, norm in norms.items()}
    total, squares = max(1, sum(zeros.values())), sum(norm**2 for norm in norms.values())
    average, rms = sum(norms.values()) / total, (squares / total) ** 0.5
    return own | {"zero_grad_norm/average": average, "zero_grad_norm/rms": rms}


def effective_ranks(weight: Tensor) -> tuple[float, float]:
    """(singular values above `RANK_THRESHOLD` of the largest, as a share of the shorter side; exp of their entropy).

    The second is exp(-Σ p ln p) with p = σ/Σσ (Roy & Vetterli 2007). Both are 0 for a matrix of zeros.
    """
    singular = torch.linalg.svdvals(weight.float()).double().cpu()
    if not singular[0]:
        return 0.0, 0.0
    shares = singular / singular.sum()
    above = int((singular > RANK_THRESHOLD * singular[0]).sum())
    return above / len(singular), float(torch.exp(torch.special.entr(shares).sum()))


def slope(values: Sequence[float]) -> float:
    """The slope of the least-squares line through values at 0, 1, 2, ...; 0 of fewer than two."""
    if len(values) < 2:
        return 0.0
    centred = np.arange(len(values)) - (len(values) - 1) / 2
    return float(centred @ np.asarray(values) / (centred @ centred))
