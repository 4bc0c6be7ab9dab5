"""Which failed runs a sweep tries again: for a run without memory, only where it may have enough now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil

from tune_sparse.config import SweepConfig
from tune_sparse.config.budgets import TOKEN_BUDGETS
from tune_sparse.errors import TooLargeError, is_out_of_host_memory
from tune_sparse.evaluation.card_budgets import budgets_for
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.models.dims import ModelDims
from tune_sparse.sweep.cards import gpus_asked, local_devices

LARGER = 1.02
"""Two devices of one kind differ by less in what they say of their memory."""


def is_missing(record: Record | None, retry_failed: bool = False) -> bool:
    """Whether a run with this record has to run: it has none, was interrupted or stopped early, or failed and may go
    well now. Whether a sweep would stop it again is asked elsewhere."""
    if record is None or record.status in ("interrupted", "stopped"):
        return True
    if record.status == "failed":
        return retry_failed or bool(record.error and record.error["retryable"])
    return False


def lacked_memory(record: Record | None) -> bool:
    """Whether a run failed for good because a whole device had too little memory."""
    error = record.error if record and record.status == "failed" else None
    return bool(error and not error["retryable"] and "device_memory_bytes" in error)


def has_more_memory_now(record: Record, run: Run, config: SweepConfig, dims: ModelDims) -> str | None:
    """Why a run that lacked memory may go well now: a new version, a larger device, smaller budgets; None if nothing
    changed. The devices of a Ray cluster are not known before it is joined."""
    error = record.error or {}
    of_gpu = bool(gpus_asked(config)) and not is_out_of_host_memory(error)
    place = describe_gpu() if of_gpu else describe_machine()
    if error["version"] != place["version"]:
        return "a new version"
    device_bytes, before = place["device_memory_bytes"], error["device_memory_bytes"]
    if not device_bytes or not before:
        return None
    if device_bytes > LARGER * before:
        return "a larger device"
    has_smaller = of_gpu and _has_smaller_budgets(error.get("budgets"), run, config, dims, device_bytes)
    return "smaller budgets" if has_smaller else None


def _has_smaller_budgets(
    then: Mapping[str, Any] | None, run: Run, config: SweepConfig, dims: ModelDims, device_bytes: int
) -> bool:
    if then is None:
        return False
    cell = CellMemory(dims, run.cell.mode, run.cell.method, run.protocol, run.cell.sparsity)
    try:
        found = budgets_for(device_bytes, gpus_asked(config), cell, config.budgets)
    except TooLargeError:
        return False
    now = found.as_record()
    fewer = any(now[name] < then[name] for name in TOKEN_BUDGETS)
    recomputes = now["activation_checkpointing"] and not then["activation_checkpointing"]
    return fewer or recomputes or (then["keeps_effective_weights"] and not now["keeps_effective_weights"])


def describe_gpu() -> dict[str, Any]:
    """The memory of the largest GPU that a trial could have, and the version of this code."""
    return _place(lambda: max((device.memory_bytes for device in local_devices()), default=None))


def describe_machine() -> dict[str, Any]:
    """The memory of the machine that a trial could have for itself, and the version of this code."""
    return _place(lambda: psutil.virtual_memory().total)


def _place(memory_bytes: Callable[[], int | None]) -> dict[str, Any]:
    from trainables.hardware import code_version

    known = None if "RAY_ADDRESS" in os.environ else memory_bytes()
    return {"device_memory_bytes": known, "version": code_version()}


def memory_lines(lacking: Iterable[tuple[Run, Record, str | None]]) -> list[str]:
    """What a sweep says of runs that lacked memory: (run, its record, why it is tried again)."""
    left = "is left as failed: only a larger device, smaller budgets, a new version or --retry-failed tries it again"
    lines = []
    for run, record, why in lacking:
        device_bytes = (record.error or {})["device_memory_bytes"]
        where = f"a device of {device_bytes / 1e9:.1f} GB" if device_bytes else "a node for itself"
        again = f"is tried again: there is {why}" if why else left
        lines.append(f"{run.run_id} had too little memory on {where}, and {again}")
    return lines
