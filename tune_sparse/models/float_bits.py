"""The bits of floats: finite numbers that are not negative are ordered as their bits are."""

from __future__ import annotations

from torch import Tensor, bfloat16, dtype, float16, float32, int16, int32

CHUNK = 1 << 18
"""Numbers handled at once, so that they stay in the processor's cache."""
BITS: dict[dtype, tuple[dtype, int, int]] = {
    bfloat16: (int16, 0x7FFF, 0x7F80),
    float16: (int16, 0x7FFF, 0x7C00),
    float32: (int32, 0x7FFFFFFF, 0x7F800000),
}
"""{float: (integer of its size, all bits but the sign, exponent bits of NaN and inf)}"""


def view_bits(tensor: Tensor) -> Tensor:
    """The numbers' bits as integers, flat."""
    assert tensor.dtype in BITS, tensor.dtype
    return tensor.contiguous().view(-1).view(BITS[tensor.dtype][0])


def is_finite(tensor: Tensor) -> bool:
    """Neither NaN nor inf is in a tensor. `isfinite` would make a copy of the tensor's size."""
    if tensor.dtype not in BITS:
        return bool(tensor.isfinite().all())
    _, magnitude, infinite = BITS[tensor.dtype]
    return all(int((chunk & magnitude).max()) < infinite for chunk in view_bits(tensor).split(CHUNK) if len(chunk))
