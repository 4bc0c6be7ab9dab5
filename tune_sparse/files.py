"""Places of files, and writing them whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tune_sparse.errors import DISK_FULL, InputError


def cache_dir() -> Path:
    """Return the folder of what can be made again: toy models, fingerprints. `TUNE_SPARSE_CACHE` overrides it."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tune-sparse"
    return Path(os.environ.get("TUNE_SPARSE_CACHE") or default)


def aside(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process uses, to write before a rename."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Lend a hidden name to write a file to; it takes the name `path` if the block ends well, and else nothing stays.

    The folder must exist. A reader never sees half of the file.
    """
    partial = aside(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replaces: bool = False) -> Iterator[Path]:
    """Lend a hidden folder to fill; it takes the name `path` if the block ends well, and else nothing stays.

    A folder that has the name goes if the new one `replaces` it; otherwise it stays, and `OSError` is raised.
    """
    partial = aside(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        if replaces:
            replace_folder(partial, path)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Give a whole folder its name; one that was there before goes."""
    old = aside(folder)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def flush(*paths: Path) -> None:
    """Have files, or the names in folders, on the disk itself. A power failure could else leave names alone."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some network disks cannot do this for a folder
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing, into a folder that exists."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write as `write_text` does; a value that is not finite is refused, since JSON has no NaN."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """One compact JSON value a line."""
    lines = (json.dumps(v, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for v in values)
    write_text(path, "".join(line + "\n" for line in lines))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check_room(folder: Path, needed_bytes: int, writer: str, fix: str) -> None:
    """Raise `InputError` if the file system of a folder, or a quota on it, has no room for what `writer` writes.

    Free space says nothing of a quota: the room is asked for, and given back, where the file system knows how.
    """
    free_bytes = shutil.disk_usage(folder).free
    lack = f"has {free_bytes / 1e9:.2f} GB" if needed_bytes > free_bytes else _reserve(folder, needed_bytes)
    if lack:
        raise InputError(
            f"{writer} needs room for what it writes, about {needed_bytes / 1e9:.2f} GB, {folder} {lack}. {fix}"
        )


def _reserve(folder: Path, count: int) -> str:
    """Take `count` bytes and give them back; returns why the file system did not give them, or nothing."""
    program, probe = shutil.which("fallocate"), folder / ".room"
    if program is None:
        return ""
    try:
        completed = subprocess.run([program, "-l", str(count), str(probe)], capture_output=True, text=True)
    finally:
        probe.unlink(missing_ok=True)
    return next((f"refuses it: {message}" for message in DISK_FULL if message in completed.stderr), "")
