"""Checks of this machine, each fault with its fix."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import psutil

from tune_sparse.doctor import Check, check
from tune_sparse.errors import InputError
from tune_sparse.files import cache_dir
from tune_sparse.sweep.resources import available_cores

PYTHON = "3.11"
LEAST_MEMORY_BYTES, LEAST_DISK_BYTES = 4e9, 2e9
"""Needed by the toy models with two workers, and for their results."""
SHOWN = 5
BFLOAT16_MAJOR = 8
"""Cards of this compute capability and higher compute in bfloat16."""


def examine(results_dir: Path) -> Iterator[Check]:
    """Python, packages, hardware, disk and the cache of models."""
    yield check_python("Python", platform.python_version())
    yield check_packages("packages", installed())
    yield _torch()
    yield Check("CPU", True, f"{available_cores()} cores: as many trials at once, with a thread each")
    memory = psutil.virtual_memory()
    yield check(
        "memory",
        memory.available >= LEAST_MEMORY_BYTES,
        f"{memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB free",
        "Free some, or sweep with --workers 1.",
    )
    yield _folder("results", results_dir, "Free some, or give another --results-dir.")
    yield _folder("cache", cache_dir(), "Set TUNE_SPARSE_CACHE to a folder with room.")
    yield _toy_models()


def tested() -> dict[str, str]:
    """{package: the version that the whole was tested with}"""
    lines = (files("cluster") / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): pinned.strip() for name, pinned in pairs}


def installed() -> dict[str, str]:
    """{package: its version here}, for those of the tested packages that are here."""
    found = {}
    for name in tested():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_python(what: str, found: str) -> Check:
    is_well = found.startswith(f"{PYTHON}.")
    return check(what, is_well, found, f"Make the environment with Python {PYTHON}.")


def check_packages(what: str, found: Mapping[str, str]) -> Check:
    """Compare packages with the versions that were tested; a local build (`+cpu`) is the same version."""
    expected = tested()
    differing = [
        f"{name} {found[name]} ({pinned} was tested)"
        for name, pinned in expected.items()
        if name in found and found[name].partition("+")[0] != pinned
    ]
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    shown = f"{', '.join(differing[:SHOWN])}{more}" if differing else f"{len(found)} as they were tested"
    return check(what, not differing, shown, "Run `make`, or pip install with -c cluster/constraints.txt.")


def _torch() -> Check:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} of {card.total_memory / 1e9:.0f} GB" for card in cards)
        lacking = sorted({card.name for card in cards if card.major < BFLOAT16_MAJOR})
        lack = f"; {', '.join(lacking)} without bfloat16" if lacking else ""
        fix = "Set precision=float32 there, which takes twice the memory, or take a newer card."
        return check("GPU", not lacking, f"torch {torch.__version__}: {names}{lack}", fix)
    has_driver = shutil.which("nvidia-smi") is not None
    shown = "there is a driver, and torch sees no GPU" if has_driver else "none: trials compute on the CPU"
    fix = "Install the CUDA build of torch: `make TORCH_OPTIONS=...` in the README."
    return check("GPU", not has_driver, f"torch {torch.__version__}: {shown}", fix)


def _folder(what: str, folder: Path, fix: str) -> Check:
    there = existing(folder)
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Check(what, False, f"{there} cannot be written", fix)
    return check(what, free >= LEAST_DISK_BYTES, f"{free / 1e9:.0f} GB free at {folder.resolve()}", fix)


def existing(folder: Path) -> Path:
    """A folder, or what will hold it."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())


def _toy_models() -> Check:
    from tune_sparse.models.checkpoints import find_folder
    from tune_sparse.models.toy_models import TOY_MODELS

    missing = []
    for name in TOY_MODELS:
        try:
            find_folder(name)
        except InputError:
            missing.append(name)
    return Check(
        "toy models",
        True,
        f"{', '.join(missing)} not trained yet: a sweep does it, or `tune-sparse prepare`" if missing else "trained",
    )
