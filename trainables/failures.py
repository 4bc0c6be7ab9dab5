"""Which errors of a run may pass, and how an error is recorded."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from tune_sparse.errors import DISK_FULL, NotReadyError

INFRASTRUCTURE_ERRORS = (
    torch.OutOfMemoryError,
    torch.AcceleratorError,
    MemoryError,
    ConnectionError,
    TimeoutError,
    NotReadyError,  # of this node: another one may have the model or the examples
)
# safetensors and torch's CPU allocator give their own classes to what the system said.
INFRASTRUCTURE_MESSAGES = (*DISK_FULL, "Stale file handle", "Input/output error", "DefaultCPUAllocator")


def is_infrastructure(error: Exception) -> bool:
    """Whether a run may go well another time or elsewhere; every other error would come again in the same way."""
    text = str(error)
    return isinstance(error, INFRASTRUCTURE_ERRORS) or any(message in text for message in INFRASTRUCTURE_MESSAGES)


def describe_error(error: BaseException, retryable: bool) -> dict[str, Any]:
    return {
        "class": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "retryable": retryable,
    }
