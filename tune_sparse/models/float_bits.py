"""The bits of floats: finite numbers that are not negative are ordered as their bits are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, bfloat16, dtype, float16, float32, int16, int32, tensor

CHUNK = 1 << 18
"""Numbers handled at once, so that they stay in the processor's cache."""
CHUNK_ELSEWHERE = 1 << 24
"""Numbers handled at once by a GPU, which has launches to save and no cache to stay in."""
BITS: dict[dtype, tuple[dtype, int, int]] = {
    bfloat16: (int16, 0x7FFF, 0x7F80),
    float16: (int16, 0x7FFF, 0x7C00),
    float32: (int32, 0x7FFFFFFF, 0x7F800000),
}
"""{float: (integer of its size, all bits but the sign, exponent bits of NaN and inf)}"""


def view_bits(numbers: Tensor) -> Tensor:
    """The numbers' bits as integers, flat."""
    assert numbers.dtype in BITS, numbers.dtype
    return numbers.contiguous().view(-1).view(BITS[numbers.dtype][0])


def flat_chunks(flat: Tensor) -> tuple[Tensor, ...]:
    """A flat tensor in pieces, so long as a device computes statistics of best."""
    return flat.split(CHUNK if flat.device.type == "cpu" else CHUNK_ELSEWHERE)


def row_chunks(matrix: Tensor, chunk: int = CHUNK) -> Iterator[slice]:
    """All rows of a matrix, so many at once as a device computes statistics of best. chunk: numbers on a CPU."""
    step = max(1, (chunk if matrix.device.type == "cpu" else CHUNK_ELSEWHERE) // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def from_bits(bits: int, dtype: dtype) -> float:
    """The number that has these bits."""
    return float(tensor(bits, dtype=BITS[dtype][0]).view(dtype))


def is_finite(numbers: Tensor) -> bool:
    """Neither NaN nor inf is in a numbers. `isfinite` would make a copy of the tensor's size."""
    if numbers.dtype not in BITS:
        return bool(numbers.isfinite().all())
    _, magnitude, infinite = BITS[numbers.dtype]
    return all(int((chunk & magnitude).max()) < infinite for chunk in view_bits(numbers).split(CHUNK) if len(chunk))
