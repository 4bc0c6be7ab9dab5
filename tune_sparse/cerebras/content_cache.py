"""Folders that can be made again, named by what is in them, under a byte limit: the least recently used go first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from tune_sparse.errors import InputError
from tune_sparse.files import atomic_folder, cache_dir

LIMIT_VARIABLE = "TUNE_SPARSE_CEREBRAS_CACHE_BYTES"
LIMIT_BYTES = 200 * 10**9
"""Five conversions of a 7B model in float32 and their examples."""


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `make` if it is not there: whole, or absent if that fails.

    Processes that want the same folder wait for the first of them. Others may go, to stay under the limit.
    """
    root = cache_dir() / "cerebras"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    with FileLock(root / f".{name}.lock"):
        if not folder.is_dir():
            with atomic_folder(folder) as partial:
                make(partial)
        os.utime(folder)
    _make_room(root, folder)
    return folder


def limit_bytes() -> int:
    value = os.environ.get(LIMIT_VARIABLE, str(LIMIT_BYTES))
    if not value.isdecimal():
        raise InputError(f"{LIMIT_VARIABLE} is a number of bytes, got {value!r}. Write {LIMIT_BYTES}, say.")
    return int(value)


def _make_room(root: Path, wanted: Path) -> None:
    """Remove the least recently used folders but `wanted`, until the limit is kept."""
    limit = limit_bytes()
    with FileLock(root / ".room.lock"):
        folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: size_bytes(path) for path in folders}
        for path in sorted(folders, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) <= limit:
                return
            if path != wanted:
                shutil.rmtree(path)
                sizes[path] = 0


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
