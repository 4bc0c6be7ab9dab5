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
from tune_sparse.errors import InputError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "ray", "numpy", "safetensors", "tokenizers")


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
        "card": card(),
        "attention": attention_kernels(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
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


def card() -> dict[str, Any] | None:
    """Name, memory, capability and driver of the GPU that this process computes on; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def driver_version() -> str | None:
    """Version of the GPU's driver; None where nothing tells it."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None


def attention_kernels() -> str:
    """The kernels among which scaled dot-product attention chooses: their rounding differs."""
    enabled = {"flash": torch.backends.cuda.flash_sdp_enabled(), "math": torch.backends.cuda.math_sdp_enabled()}
    if torch.cuda.is_available():
        enabled |= {
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        }
    return " ".join(name for name, is_enabled in enabled.items() if is_enabled)


def check_precision(precision: str) -> None:
    """Raise `InputError` for a precision that the GPU of this process does not compute in; emulation does not count."""
    if precision == "bfloat16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise InputError(
            f"precision bfloat16 needs a GPU that computes in it, got {hardware_name()}. "
            "Set precision=float32, or take a card of compute capability 8.0 or higher."
        )


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
