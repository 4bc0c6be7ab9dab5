"""Mistakes in a user's input, said so that they can be fixed; and failures of a run."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

DISK_FULL = ("No space left on device", "Disk quota exceeded", "Read-only file system")
"""Messages of the system where nothing more can be written, whatever class of error a library makes of it."""
OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "running low on memory"),
    *("status_alloc_failed", "erroroutofmemory"),
    "failed to cuda calloc",
)
"""In lower case, parts of what torch, cuBLAS and its like (CUBLAS_STATUS_ALLOC_FAILED), HIP, NCCL, the system and Ray
say where memory was too little."""
OUT_OF_HOST_MEMORY = ("defaultcpuallocator", "allocate memory", "running low on memory")
"""In lower case, parts of those that speak of the machine, not of its GPU."""


class InputError(ValueError):
    """The user's input breaks a rule. The message has the rule, the value received and the fix."""


class NotReadyError(InputError):
    """Nothing is wrong with the input, but something has to be fetched, made or named before a sweep can run."""


class TooLargeError(InputError):
    """A device has too little memory for a run, whatever its budgets. The message has the bytes and the fix."""


class RunError(RuntimeError):
    """A run that would fail again in the same way: recorded, never retried."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An error that offers the closest of the known names before listing all of them."""
    known = sorted(known)
    close = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return InputError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


def is_out_of_memory(error: Mapping[str, Any]) -> bool:
    """Whether a recorded error (class, message) is of a process that had too little memory, or was refused for it."""
    memory_classes = ("OutOfMemoryError", "MemoryError", "TooLargeError")
    return error["class"] in memory_classes or any(text in error["message"].lower() for text in OUT_OF_MEMORY)


def is_out_of_host_memory(error: Mapping[str, Any]) -> bool:
    """Whether it was the machine that had too little memory, which all its trials share, and not a GPU."""
    message = error["message"].lower()
    return error["class"] == "MemoryError" or any(text in message for text in OUT_OF_HOST_MEMORY)
