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
from tune_sparse.files import atomic_folder, cache_dir
from tune_sparse.models.model_zoo import separated, tensor_name
from tune_sparse.models.safetensors_io import TensorWriter

VERSION = 0.5
TENSOR = "TorchTensorSerializer"
BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.model", "chat_template*")
"""What a Hugging Face folder has beside its weights."""


def mdl_folder(path: Path) -> Path:
    """The Hugging Face folder of a `.mdl`, made once for each content; config.json and tokenizer are those beside it.

    Raises `InputError` for a file that is cut off, of another version, or has pickled weights or unmerged adapters.
    """
    stamp = path.stat()
    name = hashlib.sha256(f"{path.resolve()} {stamp.st_size} {stamp.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_dir() / "mdl" / f"{path.stem}-{name}"
    if not folder.is_dir():
        if not (path.parent / "config.json").is_file():
            raise InputError(
                f"a .mdl needs the model's config.json of Hugging Face beside it, {path.parent} has none. Copy it "
                "there, and the tokenizer's files for training."
            )
        with atomic_folder(folder) as partial:
            write_hugging_face(path, partial)
    return folder


def write_hugging_face(path: Path, folder: Path) -> None:
    """Write the weights of a `.mdl`, and what stands beside it, into a folder that exists, one tensor at a time."""
    for pattern in BESIDE:
        for beside in path.parent.glob(pattern):
            shutil.copy(beside, folder)
    config = json.loads((path.parent / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    with _opened(path) as file:
        entries = dict(_weights(path, file))
        if config.get("tie_word_embeddings"):
            entries.pop("lm_head.weight", None)
        declared = {name: _declared(entry) for name, (_, entry) in entries.items()}
        with TensorWriter(folder / "model.safetensors", declared) as writer:
            for name, (key, _) in entries.items():
                writer.write(name, separated(name, _tensor(file[key], *declared[name]), head_dim))
            writer.done()


def _opened(path: Path) -> Any:
    """Open a `.mdl`. Raises `InputError` unless it is whole and of the one version that is known."""
    try:
        h5py = import_module("h5py")
        import_module("hdf5plugin")
    except ImportError as error:
        raise InputError(
            f"a .mdl needs h5py and hdf5plugin: {error}. Install them with `pip install tune-sparse[cerebras-files]`."
        ) from error
    if not h5py.is_hdf5(path):
        raise InputError(
            f"a .mdl must be HDF5, {path} is not. Save it again with cstorch.save of release 2.0 or later."
        )
    file = h5py.File(path, "r")
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
