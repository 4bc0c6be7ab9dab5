"""A `.mdl` of Cerebras as a model: read as it was written, and refused by name where it cannot be trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tune_sparse.cli import main
from tune_sparse.errors import InputError
from tune_sparse.models.checkpoints import check_checkpoint, find_folder
from tune_sparse.models.mdl_writer import replace_by_mdl
from tune_sparse.models.model_zoo import hugging_face_config, interleaved, zoo_tensor_name

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install tune-sparse[cerebras-files]")
hdf5plugin = pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")


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
    config = json.loads((llama / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    own = load_file(llama / "model.safetensors")
    return {zoo_tensor_name(name) or "": interleaved(name, t, head_dim).contiguous() for name, t in own.items()}


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
    prune = ["prune", str(tmp_path / "m.mdl"), "--sparsities", "0.5", "--checkpoints", "--output", str(output)]
    assert main(prune) == 0
    [masks], [pruned] = output.rglob("masks_*.safetensors"), output.rglob("checkpoint_*")
    assert main(["validate", str(pruned), "--masks", str(masks)]) == 0
    weights = load_file(pruned / "model.safetensors")
    assert main([*prune, "--mdl"]) == 0
    assert not list(pruned.glob("*.safetensors"))
    assert main(["validate", str(pruned / "model.mdl"), "--masks", str(masks)]) == 0
    assert_equal(load_file(find_folder(str(pruned / "model.mdl")) / "model.safetensors"), weights)


def test_a_recovered_model_is_written_as_a_mdl_too(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    prune = ["prune", str(llama), "--sparsities", "0.5", "--checkpoints", "--recover", "reconstruct"]
    prune += ["--calibration", str(tmp_path / "text.txt"), "--calibration-window", "32", "--output"]
    assert main([*prune, str(tmp_path / "folders")]) == 0
    assert main([*prune, str(tmp_path / "files"), "--mdl"]) == 0
    for kind in ("checkpoint", "recovered"):
        [folder], [file] = (list((tmp_path / place).rglob(f"{kind}_*")) for place in ("folders", "files"))
        assert not list(file.glob("*.safetensors"))
        found = find_folder(str(file / "model.mdl"))
        assert_equal(load_file(found / "model.safetensors"), load_file(folder / "model.safetensors"))


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in wanted.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_checkpoint_goes_to_a_mdl_and_back_to_the_bit(
    llama: Path, tmp_path: Path, dtype: torch.dtype, is_tied: bool
) -> None:
    beside(llama, tmp_path)
    config = json.loads((llama / "config.json").read_text()) | {"tie_word_embeddings": is_tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = {name: tensor.to(dtype) for name, tensor in load_file(llama / "model.safetensors").items()}
    if is_tied:
        del own["lm_head.weight"]
    of_old_llamas = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(own | of_old_llamas, tmp_path / "model.safetensors")
    replace_by_mdl(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert_equal(load_file(find_folder(str(tmp_path / "model.mdl")) / "model.safetensors"), own)


def test_what_a_mdl_cannot_hold_is_refused_before_anything_is_pruned(
    llama: Path, architecture_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--sparsities", "0.5", "--output", str(tmp_path / "masks"), "--mdl"]
    assert main(["prune", str(architecture_folders["MixtralForCausalLM"]), *where, "--checkpoints"]) == 2
    assert "without biases, it has no place for model.layers.0." in capsys.readouterr().err
    assert main(["prune", str(llama), *where]) == 2
    assert "got no --checkpoints. Add it" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


PARAMS = {
    "name": "llama",
    "attention_module": "multiquery_attention",
    "extra_attention_params": {"num_kv_groups": 4},
    "filter_size": 192,
    "hidden_size": 64,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 2048,
    "nonlinearity": "swiglu",
    "norm_type": "rmsnorm",
    "num_heads": 8,
    "num_hidden_layers": 3,
    "position_embedding_type": "rotary",
    "rope_theta": 10000.0,
    "rotary_dim": 8,
    "share_embedding_weights": False,
    "use_ffn_bias": False,
    "use_ffn_bias_in_attention": False,
    "use_projection_bias_in_attention": False,
    "vocab_size": 585,
}
"""What Model Zoo's converter of release 2.10 writes of the toy Llama."""
LLAMA3 = {"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("place", [("model",), ("trainer", "init", "model")])
def test_params_yaml_of_model_zoo_stands_for_the_config(llama: Path, tmp_path: Path, place: tuple[str, ...]) -> None:
    write_mdl(tmp_path / "m.mdl", beside(llama, tmp_path))
    own = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    settings: dict[str, Any] = PARAMS | {"vocab_size": own["vocab_size"]}
    for key in reversed(place):
        settings = {key: settings}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    checkpoint = check_checkpoint(str(tmp_path / "m.mdl"))
    assert checkpoint.dims == check_checkpoint(str(llama)).dims
    known = AutoConfig.from_pretrained(checkpoint.path)
    wanted = AutoConfig.from_pretrained(llama)
    for name in ("rope_parameters", "hidden_act", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(known, name) == getattr(wanted, name), name
    assert known.dtype == torch.float32
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(InputError, match=r"one \.yaml of Model Zoo such as params\.yaml, .* has 2 of them"):
        find_folder(str(tmp_path / "m.mdl"))


def test_scaled_rotary_and_windows_are_read_from_params() -> None:
    scaled = PARAMS | {"pos_scaling_factor": 8.0, "pos_scaling_type": "llama3", "pos_scaling_extra_args": LLAMA3}
    assert (
        hugging_face_config({"model": scaled}, "p")["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0} | LLAMA3
    )
    window = PARAMS | {"name": "mistral", "attention_sliding_window_length": 16}
    assert hugging_face_config({"model": window}, "p")["sliding_window"] == 16


PARAM_FAULTS = {
    "another model": ({"name": "gpt2"}, r"named llama or mistral, it has 'gpt2'"),
    "another norm": ({"norm_type": "layernorm"}, r"norm_type rmsnorm, .* it has 'layernorm'"),
    "part of a head": ({"rotary_dim": 4}, "rotary_dim 8, .* it has 4"),
    "a bias": ({"use_ffn_bias": True}, "use_ffn_bias false, .* it has True"),
}


@pytest.mark.parametrize("fault", PARAM_FAULTS)
def test_params_of_a_model_that_computes_something_else_are_refused(fault: str) -> None:
    change, message = PARAM_FAULTS[fault]
    with pytest.raises(InputError, match=f"p.yaml must .*{message}"):
        hugging_face_config({"model": PARAMS | change}, "p.yaml")
    sizes = {name: value for name, value in PARAMS.items() if name not in ("filter_size", "num_heads")}
    with pytest.raises(InputError, match="it lacks filter_size, num_heads"):
        hugging_face_config({"model": sizes}, "p.yaml")


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


def test_a_file_that_was_cut_in_two_is_refused(llama: Path, tmp_path: Path) -> None:
    write_mdl(tmp_path / "m.mdl", beside(llama, tmp_path))
    (tmp_path / "m.mdl").write_bytes((tmp_path / "m.mdl").read_bytes()[:20_000])
    with pytest.raises(InputError, match=r"must be whole, .*m\.mdl cannot be read.*Copy it again"):
        find_folder(str(tmp_path / "m.mdl"))


def test_a_file_that_is_no_hdf5_or_stands_alone_is_refused(llama: Path, tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "m.mdl")
    with pytest.raises(InputError, match=r"needs beside it the model's config\.json of Hugging Face"):
        find_folder(str(tmp_path / "m.mdl"))
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"a \.mdl must be HDF5"):
        find_folder(str(tmp_path / "m.mdl"))
