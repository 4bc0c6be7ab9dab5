"""Cerebras checkpoints (`.mdl`) as Hugging Face folders, read without any Cerebras software.

A `.mdl` is HDF5. Its root has `__version__`, `__SUCCESS__`, which is written last, and for each entry
`KEY.__metadata__`: JSON that says how the entry was written. A tensor is the dataset KEY; bfloat16 is stored as its 16
bits; tied weights are entries that name another. Whatever was pickled is never read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.files import atomic_folder, cache_dir, read_json, write_json
from tune_sparse.models.model_zoo import hugging_face_config, separated, tensor_name
from tune_sparse.models.safetensors_io import TensorWriter

VERSION = 0.5
TENSOR = "TorchTensorSerializer"
BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.model", "chat_template*")
"""What a Hugging Face folder has beside its weights."""


def mdl_folder(path: Path) -> Path:
    """The Hugging Face folder of a `.mdl`, made once for each content; config and tokenizer are those beside it.

    Raises `InputError` for a file that is cut off, of another version, or has pickled weights or unmerged adapters.
    """
    config = _config_file(path)
    stamps = [(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in (path, config)]
    name = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
    folder = cache_dir() / "mdl" / f"{path.stem}-{name}"
    if not folder.is_dir():
        with atomic_folder(folder) as partial:
            write_hugging_face(path, config, partial)
    return folder


def _config_file(path: Path) -> Path:
    """Find what describes the model of a `.mdl`: Hugging Face's config.json beside it, or one .yaml of Model Zoo."""
    found = [path.parent / "config.json"]
    if not found[0].is_file():
        found = sorted(path.parent.glob("*.yaml"))
    if len(found) != 1:
        raise InputError(
            "a .mdl needs beside it the model's config.json of Hugging Face, or one .yaml of Model Zoo such as "
            f"params.yaml, {path.parent} has {len(found)} of them. Copy it there, and for training the tokenizer's "
            "files."
        )
    return found[0]


def write_hugging_face(path: Path, config_file: Path, folder: Path) -> None:
    """Write the weights of a `.mdl`, and what stands beside it, into a folder that exists, one tensor at a time."""
    for pattern in BESIDE:
        for beside in path.parent.glob(pattern):
            shutil.copy(beside, folder)
    config = _config(config_file)
    with opened(path) as file:
        entries = dict(_weights(path, file))
        if config.get("tie_word_embeddings"):
            entries.pop("lm_head.weight", None)
        declared = {name: _declared(entry) for name, (_, entry) in entries.items()}
        if config_file.suffix == ".yaml":
            stored = {str(dtype).removeprefix("torch.") for _, dtype in declared.values()}
            write_json(folder / "config.json", config | ({"dtype": stored.pop()} if len(stored) == 1 else {}))
        head_dim = head_size(config)
        with TensorWriter(folder / "model.safetensors", declared) as writer:
            for name, (key, _) in entries.items():
                writer.write(name, separated(name, _tensor(file[key], *declared[name]), head_dim))
            writer.done()


def _config(path: Path) -> dict[str, Any]:
    """Read a config of Hugging Face, or one of Model Zoo as one of Hugging Face."""
    if path.suffix == ".json":
        config: dict[str, Any] = read_json(path)
        return config
    import yaml

    return hugging_face_config(yaml.safe_load(path.read_text()), str(path))


def head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def hdf5() -> tuple[Any, Any]:
    """(h5py, hdf5plugin). Raises `InputError` where they are not installed."""
    try:
        return import_module("h5py"), import_module("hdf5plugin")
    except ImportError as error:
        raise InputError(
            f"a .mdl needs h5py and hdf5plugin: {error}. Install them with `pip install tune-sparse[cerebras-files]`."
        ) from error


def opened(path: Path) -> Any:
    """Open a `.mdl`. Raises `InputError` unless it is whole and of the one version that is known."""
    h5py, _ = hdf5()
    if not h5py.is_hdf5(path):
        raise InputError(
            f"a .mdl must be HDF5, {path} is not. Save it again with cstorch.save of release 2.0 or later."
        )
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"a .mdl must be whole, {path} cannot be read: {error}. Copy it again.") from error
    version = file.attrs.get("__version__")
    if version != VERSION:
        raise InputError(
            f"a .mdl must be of version {VERSION}, {path} is of {version}. Save it again with release 2.5."
        )
    if not file.attrs.get("__SUCCESS__", False):
        raise InputError(f"a .mdl must end with its mark of success, {path} was cut off in writing. Save it again.")
    return file


def _weights(path: Path, file: Any) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """Yield (Hugging Face name, (key of the dataset, metadata)) of each weight, tied ones once."""
    for attribute in file.attrs:
        key = attribute.removesuffix(".__metadata__")
        if key == attribute or not key.startswith("model."):
            continue
        if key.endswith(("lora_A", "lora_B")):
            raise InputError(f"a .mdl must have its adapters merged, {path} has {key}. Merge them first.")
        name, entry = tensor_name(key.removeprefix("model.")), json.loads(file.attrs[attribute])[attribute]
        if name is None or entry.get("__LINKED__"):
            continue
        if entry.get("__TYPE__") != TENSOR or key not in file:
            raise InputError(f"a weight in a .mdl must be a tensor, {key} in {path} is {entry.get('__TYPE__')}.")
        yield name, (key, entry)


def _declared(entry: Mapping[str, Any]) -> tuple[torch.Size, torch.dtype]:
    [shape], [dtype] = entry["shapes"], entry["dtypes"]
    return torch.Size(shape), getattr(torch, dtype.removeprefix("torch."))


def _tensor(dataset: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    array = dataset[...]
    tensor = torch.from_numpy(array.view("int16") if dtype == torch.bfloat16 else array)
    return tensor.view(dtype).reshape(shape) if dtype == torch.bfloat16 else tensor.reshape(shape).to(dtype)
