"""How important is each weight? A score is a function of one matrix; the lowest scores are pruned first."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def magnitude(weight: Tensor, name: str, seed: int) -> Tensor:
    """|w|. weight: (O, I); the result has its shape (Han et al. 2015, arXiv:1506.02626)."""
    return weight.abs()


def random(weight: Tensor, name: str, seed: int) -> Tensor:
    """Uniform in [0, 1), the same for one (seed, matrix name) on every machine and in any order of the matrices."""
    return uniform(weight.shape, f"{seed}/{name}").to(weight.device)


def uniform(shape: torch.Size, key: str) -> Tensor:
    """Uniform in [0, 1) on the CPU, from a stream of random numbers that `key` names."""
    stream = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(stream))


def group_norms(*parts: Tensor) -> Tensor:
    """L2 norm of each group of weights that fall together (Li et al. 2017, arXiv:1608.08710).

    parts: (G, ...) each, row g holding the weights that group g has in that matrix; the result is (G,).
    """
    return torch.cat([part.flatten(1).float() for part in parts], dim=1).norm(dim=1)
