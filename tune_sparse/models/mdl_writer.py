"""Checkpoints as `.mdl`, written without any Cerebras software: what `tune_sparse.models.mdl` reads, the other way.

A file is what `cstorch.save` writes of a state {"model": weights} whose names are those of Model Zoo's Trainer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.files import atomic_file, read_json
from tune_sparse.models.mdl import TENSOR, VERSION, hdf5, head_size
from tune_sparse.models.model_zoo import TIED_NORM, interleaved, zoo_tensor_name
from tune_sparse.models.safetensors_io import INDEX, TensorFiles, weight_files

FILE = "model.mdl"
PREFIX = "model.model."
"""The state has the entry `model`, and the Trainer's module has the model as `model`, too."""
RTFX = {torch.float16: 10, torch.float32: 11, torch.bfloat16: 15}
"""Cerebras' own numbers of dtypes."""
LINKS = {TIED_NORM: "transformer_decoder.norm.weight", "lm_head.weight": "embedding_layer.word_embeddings.weight"}
"""{a tensor: the one that it shares its weights with, where a checkpoint does not store it}"""
COMPUTED = ".rotary_emb.inv_freq"
"""What old checkpoints of Llama store of the positions: every reader computes it."""
LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def check_writable(weights: Iterable[str]) -> None:
    """Raise `InputError` where h5py is missing, or for a weight that a Llama or Mistral of Model Zoo does not have."""
    hdf5()
    for name in _written(weights):
        if zoo_tensor_name(name) is None:
            raise InputError(
                f"a .mdl holds a Llama or Mistral without biases, it has no place for {name}. Write a Hugging Face "
                "folder."
            )


def _written(weights: Iterable[str]) -> list[str]:
    return [name for name in weights if not name.endswith(COMPUTED)]


def replace_by_mdl(folder: Path) -> None:
    """Write the weights of a Hugging Face folder as `model.mdl` in it, and remove their safetensors files."""
    write_mdl(folder, folder / FILE)
    for path in (*weight_files(folder), folder / INDEX):
        path.unlink(missing_ok=True)


def write_mdl(folder: Path, path: Path) -> None:
    """Write the weights of a Hugging Face folder as a `.mdl`, one tensor at a time. Raises as `check_writable`."""
    tensors = TensorFiles(weight_files(folder))
    check_writable(tensors)
    head_dim = head_size(read_json(folder / "config.json"))
    h5py, _ = hdf5()
    with atomic_file(path) as partial, h5py.File(partial, "w") as file:
        keys = {f"{PREFIX}{zoo_tensor_name(name)}": name for name in _written(tensors)}
        for key, name in keys.items():
            _write_tensor(file, key, interleaved(name, tensors[name], head_dim))
        for name, other in LINKS.items():
            if (key := f"{PREFIX}{name}") not in keys:
                link = {"key": f"{PREFIX}{other}", "__LINKED__": True, "__TYPE__": "LinkedObject", "__NONE__": True}
                _describe(file, key, link)
        names = sorted({*keys, *(f"{PREFIX}{name}" for name in LINKS)})
        inner = [name.removeprefix("model.") for name in names]
        shown = [{"model": dict.fromkeys(inner, "*")}, _tree(["model"], [_node(inner, [LEAF] * len(inner))])]
        file.attrs["__spec__"] = json.dumps(shown)
        file.attrs["__version__"] = VERSION
        file.attrs["__cstorch_version__"] = "none: written by tune-sparse"
        file.attrs["__SUCCESS__"] = True


def _write_tensor(file: Any, key: str, tensor: Tensor) -> None:
    _, hdf5plugin = hdf5()
    stored = tensor.contiguous()
    numbers = (stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).numpy()
    dataset = file.create_dataset(key, data=numbers, **hdf5plugin.LZ4())
    described = {
        "__TORCH__": True,
        "shapes": [list(tensor.shape)],
        "dtypes": [str(tensor.dtype)],
        "rtfx_dtypes": [RTFX[tensor.dtype]],
        "__TYPE__": TENSOR,
        "__NUMPY__": True,
        "compressed": False,
    }
    dataset.attrs.update(described)
    _describe(file, key, described)


def _describe(file: Any, key: str, described: Mapping[str, Any]) -> None:
    spec = [{key: "*"}, _tree([key], [LEAF])]
    entry = {"__spec__": spec, "__objects__": [key], f"{key}.__metadata__": described}
    file.attrs[f"{key}.__metadata__"] = json.dumps(entry)


def _tree(keys: Sequence[str], children: Sequence[Mapping[str, Any]]) -> str:
    """Describe a dict as `torch.utils._pytree.treespec_dumps` does."""
    return json.dumps([1, _node(keys, children)])


def _node(keys: Sequence[str], children: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"type": "builtins.dict", "context": json.dumps(keys), "children_spec": children}
