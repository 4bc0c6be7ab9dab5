"""Keep-masks as bits, an eighth of a byte a weight: each is made whole only while it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """The bits of a bool mask in the order of `numpy.packbits`, the first weight highest: (ceil(weights / 8),)."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy()))
    flat = mask.flatten().view(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    bits = padded[:, 0] << 7
    for place in range(1, 8):
        bits |= padded[:, place] << (7 - place)
    return bits


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask of this shape."""
    weights = prod(shape)
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=weights).view(bool)).view(shape)
    unpacked = bits.new_empty(len(bits), 8)
    for place in range(8):
        unpacked[:, place] = (bits >> (7 - place)) & 1
    return unpacked.flatten()[:weights].view(torch.bool).view(shape)


class BitMasks(Mapping[str, Tensor]):
    """{checkpoint tensor name: keep-mask}; bits and number of kept weights are all that stays in memory."""

    def __init__(self, bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, int]):
        self.bits, self.shapes, self.kept = bits, shapes, kept

    @classmethod
    def pack(cls, masks: Iterable[tuple[str, Tensor]]) -> BitMasks:
        """From (name, bool mask) pairs, each dropped before the next is asked for; waits for the device once."""
        bits: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        counts: list[Tensor] = []
        for name, mask in masks:
            bits[name], shapes[name] = pack_bits(mask), tuple(mask.shape)
            counts.append(mask.count_nonzero())
        return cls(bits, shapes, dict(zip(bits, torch.stack(counts).tolist(), strict=True)) if counts else {})

    @classmethod
    def from_bits(cls, bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> BitMasks:
        """From packed bits, whose kept weights are counted on the CPU."""
        kept = {name: int(np.bitwise_count(packed.cpu().numpy()).sum()) for name, packed in bits.items()}
        return cls(bits, shapes, kept)

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(self.bits[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    def to(self, device: torch.device) -> BitMasks:
        return BitMasks({name: bits.to(device) for name, bits in self.bits.items()}, self.shapes, self.kept)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, over all matrices."""
        return 1 - sum(self.kept.values()) / sum(map(prod, self.shapes.values()))

    @cached_property
    def sha256(self) -> str:
        """A checksum over names, shapes and bits, matrix by matrix in the order of their names."""
        digest = hashlib.sha256()
        for name in sorted(self.bits):
            digest.update(f"{name}{self.shapes[name]}".encode())
            digest.update(self.bits[name].cpu().numpy().data)
        return digest.hexdigest()
