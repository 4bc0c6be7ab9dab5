"""The bytes of live tensors, counted at every operation: what a stage holds at most, whatever the allocator keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 1 << 20
"""Only tensors of these bytes or more are looked up among the mapped files: the look-up reads a file of the kernel."""


class LiveBytes(TorchDispatchMode):
    """While it lasts, counts the bytes of every storage that an operation reads or makes and that still lives.

    Pages of mapped files do not count, nor tensors without data. `peak` is the most at once, from `restart` on.
    """

    def __init__(self, *held: Tensor) -> None:
        """held: tensors that live already and may not be used before others are made."""
        super().__init__()
        self.bytes = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._see(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._see(tree_leaves((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        self._see(tree_leaves(result))
        return result

    def restart(self) -> None:
        """Measure the next stage: its peak is at least what lives now."""
        self.peak = self.bytes

    def _see(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._count(value.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        # The Python object of a storage lives as long as its memory, so its id is not given to another one meanwhile.
        key = id(storage)
        if key in self._sizes or (storage.nbytes() >= LARGE and _is_mapped(storage.data_ptr())):
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key).atexit = False
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


def _is_mapped(address: int) -> bool:
    """Whether an address belongs to a file that was mapped, see proc(5)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= address < end:
            return inode != "0"
    return False
