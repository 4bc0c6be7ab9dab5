"""Random numbers that a name decides: the same on every machine, in any order of the names."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seeded_uniform(shape: torch.Size, key: str) -> Tensor:
    """Uniform in [0, 1) on the CPU, from a stream of random numbers that `key` names."""
    stream = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(stream))
