"""Where a trial ran, and what it used."""

from __future__ import annotations

import platform
import socket
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState

from tune_sparse import __version__

PACKAGES = ("torch", "transformers", "peft", "ray", "numpy", "safetensors", "tokenizers")


def device() -> torch.device:
    """Where this process computes: the accelerator that Ray left visible, or the CPU."""
    return PartialState().device


@cache
def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this process: recorded with a run, not part of its identity."""
    return {
        "hardware": hardware_name(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_sha": git_sha(),
    }


def hardware_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def git_sha() -> str | None:
    """The commit of this code with `-dirty` if files changed since, or None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def code_version() -> str:
    """The commit of this code, or its version outside a checkout."""
    return git_sha() or __version__


def gpu_memory_bytes() -> int | None:
    """Total memory of the GPU that this process computes on; None on a CPU."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def device_memory_bytes() -> int:
    """Total memory of the GPU that this process computes on, or of the machine."""
    return gpu_memory_bytes() or psutil.virtual_memory().total


def gpu_share() -> float:
    """The fraction of its GPU that `keep_within` leaves to this process."""
    return torch.cuda.get_per_process_memory_fraction()


def keep_within(gpu_fraction: float) -> None:
    """Let this process run out of memory before it takes what belongs to another on the same GPU."""
    if torch.cuda.is_available() and gpu_fraction:
        torch.cuda.set_per_process_memory_fraction(gpu_fraction)
