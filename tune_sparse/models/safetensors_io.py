"""Safetensors files read and written tensor by tensor, so that memory holds one tensor and not the model."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.files import aside, read_json
from tune_sparse.models.float_bits import is_finite
from tune_sparse.watchdog import heartbeat

INDEX = "model.safetensors.index.json"
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
NAMED = {name: dtype for dtype, name in DTYPES.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises `InputError` for a bad index or a missing file."""
    index = folder / INDEX
    try:
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} must map tensors to files: {error}. Fetch it again.") from error
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"a model folder needs its safetensors weights, {folder / name} is missing. Fetch it.")
    return [folder / name for name in names]


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some safetensors files, by name, each read when it is asked for.

    A file is opened anew for each tensor: a mapped file that stays open would count all its pages as memory. It must
    be the one that it was when it was first opened: `NotReadyError` is raised for one that changed.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in paths}
        self.paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            self._add(path)

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (a safe_open is not a mapping)
                    described = tensors.get_slice(name)
                    self.paths[name] = path
                    self.shapes[name] = tuple(described.get_shape())
                    self.dtypes[name] = _dtype(name, described.get_dtype(), path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} must be a safetensors file: {error}. Fetch it again.") from error

    def metadata(self) -> dict[str, str]:
        """The text that the first file carries."""
        with safe_open(next(iter(self.paths.values())), framework="pt") as tensors:
            return dict(tensors.metadata() or {})

    def __getitem__(self, name: str) -> Tensor:
        """The pages of the file itself, not in memory until they are used."""
        self._check_unchanged(self.paths[name])
        with safe_open(self.paths[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def read_into(self, own: Tensor, name: str) -> None:
        """Copy a tensor into one of any dtype and device, with no copy between."""
        heartbeat()
        stored = self.stored_name(name)
        own.copy_(self[stored])
        self._check_unchanged(self.paths[stored])

    def stored_name(self, name: str) -> str:
        """The name of a model's tensor here: a checkpoint of the bare decoder lacks its first part."""
        return name if name in self.paths else name.partition(".")[2]

    def _check_unchanged(self, path: Path) -> None:
        if _stamp(path) != self._stamps[path]:
            raise NotReadyError(
                f"a checkpoint must stay as it is while it is used, {path} changed since it was opened. Leave it "
                "alone, and start again."
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def _stamp(path: Path) -> tuple[int, int] | None:
    """(bytes, time of the last change in ns) of a file; None if there is none."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _dtype(name: str, dtype: str, path: Path) -> torch.dtype:
    if dtype not in NAMED:
        raise InputError(f"a tensor must be {', '.join(DTYPES.values())}, {name} in {path} is {dtype}. Convert it.")
    return NAMED[dtype]


class FiniteTensors(TensorFiles):
    """A checkpoint whose tensors are checked when they are read. Raises `InputError` for NaN or inf, by name."""

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        if not is_finite(tensor):
            raise InputError(f"weights must be finite, {name} in {self.paths[name]} has NaN or inf. Fetch it again.")
        return tensor


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in any order, beside its name; `done` gives it its name.

    shapes: {tensor name: (shape, dtype)} of all that will be written. As a context it leaves nothing half-written.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[Sequence[int], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._partial = aside(path)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, (shape, dtype) in shapes.items():
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        # safetensors wants an 8-byte length, the header, then the tensors one after the other.
        self._at = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}
        self._size = 8 + len(text) + end
        self._stream = self._partial.open("wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        self._stream.seek(self._at.pop(name))
        self._stream.write(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)

    def done(self) -> None:
        """Give the whole file its name."""
        assert not self._at, f"not written: {', '.join(self._at)}"
        self._stream.flush()
        assert self._partial.stat().st_size == self._size
        self._stream.close()
        self._partial.replace(self.path)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._partial.unlink(missing_ok=True)
