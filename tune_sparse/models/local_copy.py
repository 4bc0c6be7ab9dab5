"""Weights on a network file system, copied once to this machine: what is mapped is read again for every cell."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tune_sparse.errors import NotReadyError
from tune_sparse.files import atomic_folder, cache_dir, check_room, read_json, write_json
from tune_sparse.models.safetensors_io import weight_files
from tune_sparse.watchdog import heartbeat

MOUNTS = Path("/proc/mounts")
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "ceph", "beegfs", "afs", "panfs", "9p", "fuse")
"""File systems whose pages come over a network, or from a program that may fetch them from one."""
LOCAL_FUSE = ("fuse.fuse-overlayfs",)
STAMP = "copied.json"
PIECE_BYTES = 1 << 24
PATIENCE_SECONDS = 5.0


def file_system(path: Path) -> str:
    """The kind of file system that a path lies on, as the kernel calls it; empty where the kernel does not say."""
    if not MOUNTS.is_file():
        return ""
    mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
    places = [(Path(place.replace("\\040", " ")), kind) for place, kind in mounts]
    resolved = path.resolve()
    # Of two mounts on one place the later one is seen.
    over = [(len(place.parts), number, kind) for number, (place, kind) in enumerate(places) if _holds(place, resolved)]
    return max(over, default=(0, 0, ""))[2]


def _holds(place: Path, path: Path) -> bool:
    return place == path or place in path.parents


def is_on_network(path: Path) -> bool:
    kind = file_system(path)
    return kind.partition(".")[0] in NETWORK and kind not in LOCAL_FUSE


def local_weight_files(folder: Path) -> list[Path]:
    """The weights of a checkpoint on a disk of this machine, in the cache where they have to be copied.

    A cache that lies on a network itself is not filled. Raises `InputError` where the disk has no room.
    """
    files = weight_files(folder)
    cache = cache_dir() / "weights"
    cache.mkdir(parents=True, exist_ok=True)
    if not is_on_network(folder) or is_on_network(cache):
        return files
    copy = cache / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with _patient(FileLock(f"{copy}.lock")):
        if not (copy / STAMP).is_file() or read_json(copy / STAMP) != _stamps(files):
            _copy(files, copy)
    return [copy / path.name for path in files]


def _copy(files: list[Path], copy: Path) -> None:
    stamps = _stamps(files)
    check_room(copy.parent, sum(size for size, _ in stamps), "a local copy of weights", "Free some.")
    with atomic_folder(copy, replaces=True) as partial:
        for path in files:
            _copy_file(path, partial / path.name)
        if _stamps(files) != stamps:
            raise NotReadyError(f"a checkpoint must stay as it is while it is copied, {files[0].parent} changed.")
        write_json(partial / STAMP, stamps)


@contextmanager
def _patient(lock: FileLock) -> Iterator[None]:
    """Hold a lock; another process may copy for as long as it makes progress."""
    while True:
        try:
            lock.acquire(timeout=PATIENCE_SECONDS)
            break
        except Timeout:
            heartbeat()
    try:
        yield
    finally:
        lock.release()


def _copy_file(path: Path, copy: Path) -> None:
    with path.open("rb") as source, copy.open("wb") as target:
        while piece := source.read(PIECE_BYTES):
            target.write(piece)
            heartbeat()


def _stamps(files: list[Path]) -> list[list[int]]:
    """[bytes, time of the last change in ns] of each."""
    return [[path.stat().st_size, path.stat().st_mtime_ns] for path in files]
