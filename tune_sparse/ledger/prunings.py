"""Prunings that are made once and then only read, so that every mode on every machine shares their bits.

A results folder holds of each

    prunings/<pruning_id>/masks.safetensors     keep-masks as bits, one tensor a matrix
    prunings/<pruning_id>/weights.safetensors   where the method updates weights: those kept, matrix by matrix
    prunings/<pruning_id>/pruning.json          what decides it, checksums and sizes; written last

A folder is renamed when it is whole; the first to finish wins. Tensors are read by `pruning_io`, which verifies the
checksums before the first bit is used.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_sparse.errors import NotReadyError
from tune_sparse.files import flush, read_json
from tune_sparse.models.architectures import pruned_weights
from tune_sparse.models.dims import ModelDims

FORMAT_VERSION = 2
DESCRIPTION, MASKS, WEIGHTS = "pruning.json", "masks.safetensors", "weights.safetensors"

_verified: set[tuple[Path, int, str]] = set()  # a process hashes a file once, until the file changes


@dataclass(frozen=True)
class StoredPruning:
    """A whole pruning in a folder, as its `pruning.json` describes it."""

    folder: Path
    settings: dict[str, Any]
    """what decides it, as `Run.pruning_settings`"""
    mask_sha256: str
    """over names, shapes and bits, as records have it"""
    bytes_by_file: dict[str, int]
    sha256_by_file: dict[str, str]
    """equal for equal prunings"""
    provenance: dict[str, Any]
    """hardware and versions that made it; the calibration tokens that it saw, and what a recovery brought each block"""

    @property
    def has_weights(self) -> bool:
        """The weights that it keeps are not the dense ones, so they are stored too."""
        return WEIGHTS in self.bytes_by_file

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_file.values())

    def verify(self) -> None:
        """Hash each file, once in a process. Raises `NotReadyError` for one whose bits are not those stored."""
        for file, stored in self.sha256_by_file.items():
            path = self.folder / file
            state = (path, path.stat().st_mtime_ns, stored)
            if state in _verified:
                continue
            found = file_sha256(path)
            if found != stored:
                raise broken(self.folder, f"{file} must have the checksum {stored[:12]}, got {found[:12]}")
            _verified.add(state)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def broken(folder: Path, why: str) -> NotReadyError:
    return NotReadyError(
        f"a stored pruning must be whole, {folder} is not: {why}. Copy the folder from another results folder, or "
        "remove it: the next sweep prunes again, but finished runs of this pruning cannot be merged any more."
    )


def read_pruning(folder: Path, settings: Mapping[str, Any] | None = None) -> StoredPruning | None:
    """Read what a folder says that it holds; None if there is no such folder.

    settings: what must have decided it. Raises `NotReadyError` unless every file is there, in the size and the format
    in which it was stored.
    """
    if not folder.exists():
        return None
    stored = _described(folder)
    if settings is not None and stored.settings != settings:
        differing = sorted(k for k in stored.settings.keys() | settings if stored.settings.get(k) != settings.get(k))
        raise broken(folder, f"it is of another pruning, {', '.join(differing)} differ")
    for file, count in stored.bytes_by_file.items():
        found = (folder / file).stat().st_size if (folder / file).is_file() else 0
        if found != count:
            raise broken(folder, f"{file} must have {count} bytes, got {found}")
    return stored


def _described(folder: Path) -> StoredPruning:
    try:
        described = read_json(folder / DESCRIPTION)
        version = described.pop("format_version")
        if version == FORMAT_VERSION:
            return StoredPruning(folder, **described)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise broken(folder, f"{DESCRIPTION} cannot be read ({type(error).__name__}: {error})") from error
    raise broken(folder, f"this program reads format {FORMAT_VERSION}, {DESCRIPTION} is of format {version}")


def take_free_name(partial: Path, folder: Path) -> None:
    """Have a folder on the disk and give it its name, unless another one was faster: that one stays."""
    flush(*partial.iterdir(), partial)
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    flush(folder.parent)


def pruning_bytes(dims: ModelDims, sparsity: float, weight_bytes: int, has_weights: bool) -> int:
    """Bytes that a stored pruning takes: a bit a weight, and the kept weights where they are not the dense ones.

    weight_bytes: of a weight in the precision of the run.
    """
    weights = pruned_weights(dims)
    return weights // 8 + (round((1 - sparsity) * weights) * weight_bytes if has_weights else 0)
