"""How important is each weight? A score is a function of one matrix; the lowest scores are pruned first.

Scores are finite and not negative. weight: (O, I); the result has its shape.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Known:
    """What a score may use besides the weight."""

    name: str
    """The matrix."""
    seed: int = 0
    input_norms: Tensor | None = None
    """(I,): L2 norm of each input over all calibration tokens."""
    gradients: Tensor | None = None
    """(O, I): sum over calibration rows of |g|, g the gradient of the row's loss."""


def magnitude(weight: Tensor, known: Known) -> Tensor:
    """|w| (Han et al. 2015, arXiv:1506.02626)."""
    return weight.abs()


def random(weight: Tensor, known: Known) -> Tensor:
    """Uniform in [0, 1), the same for one (seed, matrix name) on every machine and in any order of the matrices."""
    return uniform(weight.shape, f"{known.seed}/{known.name}").to(weight.device)


def gradient(weight: Tensor, known: Known) -> Tensor:
    """Σ |g| over the calibration rows."""
    assert known.gradients is not None
    return known.gradients


def taylor(weight: Tensor, known: Known) -> Tensor:
    """Σ |w g| over the calibration rows: the first-order change of each loss if the weight were 0
    (Molchanov et al. 2017, arXiv:1611.06440, eq. 7)."""
    assert known.gradients is not None
    return weight.abs() * known.gradients


def wanda(weight: Tensor, known: Known) -> Tensor:
    """|w| ‖x‖ (Sun et al. 2023, arXiv:2306.11695, eq. 1)."""
    assert known.input_norms is not None
    return weight.abs() * known.input_norms


SCORES = {"magnitude": magnitude, "random": random, "gradient": gradient, "taylor": taylor, "wanda": wanda}


def uniform(shape: torch.Size, key: str) -> Tensor:
    """Uniform in [0, 1) on the CPU, from a stream of random numbers that `key` names."""
    stream = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(stream))


SCORES_AT_ONCE = 1 << 22
"""Scores that are normed together, as fp32."""


def group_norms(*parts: Tensor) -> Tensor:
    """L2 norm of each group of scores that fall together (Li et al. 2017, arXiv:1608.08710).

    parts: (G, ...) each, row g holding the scores that group g has in that matrix; the result is (G,).
    """
    groups = max(1, SCORES_AT_ONCE * len(parts[0]) // sum(part.numel() for part in parts))
    norms = [
        torch.cat([part.flatten(1).float() for part in some], dim=1).norm(dim=1)
        for some in zip(*(part.split(groups) for part in parts), strict=True)
    ]
    return torch.cat(norms)
