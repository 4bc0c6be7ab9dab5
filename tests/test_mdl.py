"""A `.mdl` of Cerebras as a model: read as it was written, and refused by name where it cannot be trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tune_sparse.cli import main
from tune_sparse.errors import InputError
from tune_sparse.models.checkpoints import check_checkpoint, find_folder
from tune_sparse.models.model_zoo import interleaved, tensor_name

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install tune-sparse[cerebras-files]")
hdf5plugin = pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")


def their_names(folder: Path) -> dict[str, str]:
    """{Hugging Face name: Model Zoo's}, found by the way back."""
    from tune_sparse.models.model_zoo import NAMES, NORMS, OTHER_NAMES

    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    inner = [*(f"{name}.weight" for name in NAMES.values()), *(f"{name}.weight" for name in NORMS)]
    theirs = [f"transformer_decoder.layers.{n}.{name}" for n in range(layers) for name in inner]
    outer = [name for name in OTHER_NAMES if name != "ln_f.weight"]
    return {tensor_name(name) or "": name for name in (*theirs, *outer)}


def write_mdl(path: Path, tensors: dict[str, torch.Tensor], **attributes: Any) -> None:
    """As cstorch.save of format 0.5 writes {"model": tensors}."""
    with h5py.File(path, "w") as file:
        for name, tensor in tensors.items():
            key = f"model.{name}"
            array = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
            file.create_dataset(key, data=array, **hdf5plugin.LZ4())
            entry = {"__TORCH__": True, "__TYPE__": "TorchTensorSerializer", "dtypes": [str(tensor.dtype)]}
            described = {f"{key}.__metadata__": entry | {"shapes": [list(tensor.shape)]}}
            file.attrs[f"{key}.__metadata__"] = json.dumps(described)
        file.attrs.update({"__version__": 0.5, "__cstorch_version__": "2.10.0", "__SUCCESS__": True} | attributes)


def beside(llama: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Copy what stands beside the weights; returns the weights as Model Zoo has them."""
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    config, names = json.loads((llama / "config.json").read_text()), their_names(llama)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    own = load_file(llama / "model.safetensors")
    return {names[name]: interleaved(name, tensor, head_dim).contiguous() for name, tensor in own.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_come_back_to_the_bit(llama: Path, tmp_path: Path, dtype: torch.dtype, prefix: str) -> None:
    theirs = {prefix + name: tensor.to(dtype) for name, tensor in beside(llama, tmp_path).items()}
    write_mdl(tmp_path / "m.mdl", theirs)
    back = load_file(find_folder(str(tmp_path / "m.mdl")) / "model.safetensors")
    own = load_file(llama / "model.safetensors")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], tensor.to(dtype)) for name, tensor in own.items())
    assert check_checkpoint(str(tmp_path / "m.mdl")).name == "m.mdl"


def test_a_mdl_is_pruned_and_its_checkpoint_validated(llama: Path, tmp_path: Path) -> None:
    write_mdl(tmp_path / "m.mdl", beside(llama, tmp_path))
    output = tmp_path / "masks"
    assert (
        main(["prune", str(tmp_path / "m.mdl"), "--sparsities", "0.5", "--checkpoints", "--output", str(output)]) == 0
    )
    [masks], [pruned] = output.rglob("masks_*.safetensors"), output.rglob("checkpoint_*")
    assert main(["validate", str(pruned), "--masks", str(masks)]) == 0
    sparse = beside(pruned, tmp_path)
    write_mdl(tmp_path / "pruned.mdl", sparse)
    assert main(["validate", str(tmp_path / "pruned.mdl"), "--masks", str(masks)]) == 0


FAULTS = {
    "cut off": ({"__SUCCESS__": False}, "must end with its mark of success, .* was cut off"),
    "another version": ({"__version__": 0.4}, r"must be of version 0\.5, .* is of 0\.4"),
    "pickled": (
        {"model.lm_head.weight.__metadata__": {"model.lm_head.weight.__metadata__": {"__TYPE__": "ObjectSerializer"}}},
        r"must be a tensor, model\.lm_head\.weight in .* is ObjectSerializer",
    ),
    "unmerged": ({"model.a.lora_A.__metadata__": {}}, r"must have its adapters merged, .* has model\.a\.lora_A"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_trusted_is_refused(llama: Path, tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    attributes = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in change.items()}
    write_mdl(tmp_path / "m.mdl", beside(llama, tmp_path), **attributes)
    with pytest.raises(InputError, match=message):
        find_folder(str(tmp_path / "m.mdl"))


def test_a_file_that_is_no_hdf5_or_stands_alone_is_refused(llama: Path, tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "m.mdl")
    with pytest.raises(InputError, match=r"needs the model's config\.json of Hugging Face beside it"):
        find_folder(str(tmp_path / "m.mdl"))
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"a \.mdl must be HDF5"):
        find_folder(str(tmp_path / "m.mdl"))
