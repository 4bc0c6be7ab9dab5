"""Which errors of a run may pass, and how an error is recorded."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import torch

from trainables.hardware import code_version, device_memory_bytes
from tune_sparse.errors import DISK_FULL, NotReadyError, TooLargeError, is_out_of_host_memory, is_out_of_memory
from tune_sparse.training.budgets import Budgets

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
    has_message = any(message in text for message in INFRASTRUCTURE_MESSAGES)
    return isinstance(error, INFRASTRUCTURE_ERRORS) or has_message or _lacked_memory(error)


def may_pass(error: Exception, held: Mapping[str, float]) -> bool:
    """Whether a run of a sweep may go well another time. What a whole GPU had too little memory for comes again there;
    the memory of its machine it shares with other trials.

    held: what the trial holds of Ray's resources.
    """
    has_whole_gpu = held.get("GPU", 0) >= 1 and not is_out_of_host_memory(_named(error))
    return is_infrastructure(error) and not (_lacked_memory(error) and has_whole_gpu)


def _lacked_memory(error: Exception) -> bool:
    """Not where it was refused before it allocated anything: it will be refused again."""
    return is_out_of_memory(_named(error)) and not isinstance(error, TooLargeError)


def _named(error: BaseException) -> dict[str, str]:
    return {"class": type(error).__name__, "message": str(error)}


def describe_error(error: BaseException, retryable: bool, budgets: Budgets | None = None) -> dict[str, Any]:
    """As it is recorded. One of memory says how much there was, how it was spent, and which code asked for more."""
    described: dict[str, Any] = _named(error) | {
        "traceback": "".join(traceback.format_exception(error)),
        "retryable": retryable,
    }
    if is_out_of_memory(described):
        described |= {"device_memory_bytes": device_memory_bytes(), "version": code_version()}
        described |= {"budgets": budgets.as_record() if budgets else None}
    return described
