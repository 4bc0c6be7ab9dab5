"""The most memory that each stage of a cell used."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from threading import Event, Thread

import torch

SAMPLE_SECONDS = 0.02
STATM = Path("/proc/self/statm")


class PeakMemory:
    """The peak of every stage, kept under its name when it ends. To be closed.

    On a GPU these are the bytes of torch's tensors, by its own count. On a Linux CPU they are anonymous resident
    memory (RssAnon), which leaves out the pages of a mapped checkpoint. The kernel keeps no peak of it (VmHWM counts
    those pages), so a thread looks every `SAMPLE_SECONDS`: a peak that is shorter may be missed. What glibc kept of
    freed memory is given back before each stage, which is not charged with another's. Elsewhere nothing is known.
    """

    def __init__(self) -> None:
        self.by_stage: dict[str, int] = {}
        self.reserved_bytes: int | None = None
        """The most that a GPU's allocator held, with what it kept for later: limits count that."""
        self._source = _Gpu() if torch.cuda.is_available() else _Sampler() if STATM.exists() else None

    def end(self, stage: str) -> None:
        """Keep the peak since the last stage ended under this name."""
        if self._source is None:
            return
        self.by_stage[stage] = max(self._source.restart(), self.by_stage.get(stage, 0))
        if isinstance(self._source, _Gpu):
            self.reserved_bytes = self._source.reserved_bytes

    def close(self) -> None:
        if isinstance(self._source, _Sampler):
            self._source.stop()

    @property
    def bytes(self) -> int | None:
        """The peak of all stages; None where nothing is known."""
        return max(self.by_stage.values(), default=None)


class _Gpu:
    def __init__(self) -> None:
        self.reserved_bytes = 0
        self.restart()
        self.reserved_bytes = 0

    def restart(self) -> int:
        peak = torch.cuda.max_memory_allocated()
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        return peak


class _Sampler:
    def __init__(self) -> None:
        give_back_freed()
        self._peak = anonymous_bytes()
        self._stopped = Event()
        self._thread = Thread(target=self._sample, name="peak memory", daemon=True)
        self._thread.start()

    def restart(self) -> int:
        peak = max(self._peak, anonymous_bytes())
        give_back_freed()
        self._peak = anonymous_bytes()
        return peak

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, anonymous_bytes())


def give_back_freed() -> None:
    """Let glibc return to the system what it keeps of freed memory; other libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs, see proc(5)."""
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
