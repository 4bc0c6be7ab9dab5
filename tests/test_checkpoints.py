from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from tune_sparse.config import Protocol
from tune_sparse.errors import InputError
from tune_sparse.lora.layer import adapt_model
from tune_sparse.models import checkpoints
from tune_sparse.models.architectures import ARCHITECTURES, adapter_weights, pruned_weights
from tune_sparse.models.checkpoints import (
    check_checkpoint,
    find_folder,
    load_model,
    load_tokenizer,
    prunable_weights,
    short_name,
    write_weights_into,
)
from tune_sparse.models.dims import ModelDims

CPU = torch.device("cpu")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_checkpoint(str(folder))


def test_a_sound_checkpoint_is_described(folder: Path) -> None:
    checkpoint = check_checkpoint(str(folder))
    assert (checkpoint.name, checkpoint.path) == ("model", folder)
    assert re.fullmatch("[0-9a-f]{64}", checkpoint.fingerprint)
    assert checkpoint.dims == ModelDims(
        hidden_size=64,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=192,
        vocab_size=len(load_tokenizer(folder)),
        sliding_window=None,
        max_positions=2048,
    )


def test_the_sliding_window_of_mistral_is_read(mistral: Path) -> None:
    assert check_checkpoint(str(mistral)).dims.sliding_window == 32


def test_a_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "a model folder needs config.json, .*model has none. Give a Hugging Face checkpoint")


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "needs its safetensors weights, .*model.safetensors is missing. Fetch it")


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "needs tokenizer.json or tokenizer.model, .*model has neither. Add it")


@pytest.mark.parametrize("architectures", [["GPTNeoXForCausalLM"], [], None])
def test_an_unsupported_class_is_refused(architectures: list[str] | None, folder: Path) -> None:
    change_config(folder, lambda config: config.update(architectures=architectures))
    found = architectures[0] if architectures else "no class at all"
    refused(folder, f"must be .*LlamaForCausalLM.*MistralForCausalLM.*, .*config.json says {found}")


def test_a_broken_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 64,')
    refused(folder, "config.json must be JSON: .*. Fix or fetch it again")


@pytest.mark.parametrize(("text", "found"), [("[]", "list"), ("3", "int"), ("null", "NoneType")])
def test_a_config_that_is_not_an_object_is_refused(text: str, found: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, f"config.json must map names to values, got {found}. Fetch it again")


def test_a_config_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "config.json must be JSON: .*. Fix or fetch it again")


def test_a_config_without_a_size_is_refused_by_name(folder: Path) -> None:
    change_config(folder, lambda config: config.pop("intermediate_size"))
    refused(folder, "config.json.*intermediate_size")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, folder: Path) -> None:
    change_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    refused(folder, "weights must be finite, model.layers.1.mlp.up_proj.weight in .* has NaN or inf. Fetch")


@pytest.mark.parametrize("kept_bytes", [0, 5, 3000])
def test_broken_weights_are_refused(kept_bytes: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    refused(folder, "model.safetensors must be a safetensors file: .*. Fetch it again")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_broken_index_of_shards_is_refused(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json must")


def test_an_unknown_name_offers_the_closest() -> None:
    with pytest.raises(InputError, match=r"got 'tiny-lama', which is none of them. Did you mean 'tiny-llama'"):
        check_checkpoint("tiny-lama")


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a folder, or a hub id such as org/name@revision, .* Fix the name"):
        check_checkpoint(str(tmp_path / "nowhere"))


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("empty_hub")
@pytest.mark.parametrize("reference", ["org/name", "org/name@abc"])
def test_a_hub_model_that_was_not_fetched_asks_for_prepare(reference: str) -> None:
    message = f"must be on this machine before a sweep, '{reference}' is not .*prepare --models {reference}`"
    with pytest.raises(InputError, match=message):
        check_checkpoint(reference)


@pytest.mark.usefixtures("empty_hub")
def test_a_reference_that_no_hub_id_can_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"'models/tiny llama'.*(a folder|none of them)"):
        check_checkpoint("models/tiny llama")


@pytest.mark.parametrize(
    ("reference", "name"),
    [("tiny-llama", "tiny-llama"), ("org/name@main", "name"), ("org/name@refs/pr/1", "name"), ("org/name", "name")],
)
def test_the_short_name_is_the_last_part_without_a_revision(reference: str, name: str) -> None:
    assert short_name(reference) == name


def test_the_short_name_of_a_folder_is_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert {short_name(reference) for reference in (str(folder), f"{folder}/", ".", "../model")} == {"model"}


def test_a_toy_model_that_was_not_trained_asks_for_prepare() -> None:
    message = "must be trained before it is used, 'tiny-llama' is not. Run `tune-sparse prepare --models tiny-llama`"
    with pytest.raises(InputError, match=message):
        check_checkpoint("tiny-llama")


def test_a_folder_is_found_from_the_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_folder("~/model") == folder


def test_the_fingerprint_is_of_content_not_of_place(folder: Path, llama: Path) -> None:
    assert check_checkpoint(str(folder)).fingerprint == check_checkpoint(str(llama)).fingerprint


def one_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"][0, 0] += 1


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_weights(folder, one_weight),
        lambda folder: change_config(folder, lambda config: config.update(rms_norm_eps=1e-5)),
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n"),
    ],
    ids=["one weight", "config", "tokenizer"],
)
def test_the_fingerprint_changes_with(change: Callable[[Path], object], folder: Path) -> None:
    before = check_checkpoint(str(folder)).fingerprint
    change(folder)
    assert check_checkpoint(str(folder)).fingerprint != before


def test_a_fingerprint_is_remembered_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    refuse = checkpoints._check_weights
    monkeypatch.setattr(
        checkpoints,
        "_check_weights",
        lambda folder, files: read.extend(path.name for path in files) or refuse(folder, files),
    )
    monkeypatch.setattr(checkpoints, "fingerprint_of_files", lambda files: read.append("sha256") or "f" * 64)
    for _ in range(3):
        assert check_checkpoint(str(folder)).fingerprint == "f" * 64
    assert read == ["model.safetensors", "sha256"]
    change_weights(folder, one_weight)
    check_checkpoint(str(folder))
    assert read == ["model.safetensors", "sha256"] * 2


def test_the_fingerprint_changes_with_the_settings_of_the_tokenizer(folder: Path) -> None:
    before = check_checkpoint(str(folder)).fingerprint
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|endoftext|>"', '"eos_token": "a"'))
    assert check_checkpoint(str(folder)).fingerprint != before


def test_a_weight_that_is_missing_is_not_made_up(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"a checkpoint needs all its weights, .+ lacks model\.layers\.1\.mlp\.up_proj\.weight")


def test_pruned_matrices_that_are_one_tensor_are_refused(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    blocks = model.model.layers
    blocks[1].self_attn.q_proj.weight = blocks[0].self_attn.q_proj.weight
    save_model(model, str(folder / "model.safetensors"))
    refused(folder, r"tensor of its own, model\.layers\.1\.self_attn\.q_proj\.weight is one with model\.layers\.0")


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    refused(folder, r"model\.norm\.weight in .+ must be \(64,\), got \(3,\)")


def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    refused(folder, "a tokenizer needs an end-of-text token")


def test_a_checkpoint_does_not_decide_how_text_is_generated(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5, "num_beams": 3}))
    config = load_model(folder, torch.float32, CPU).generation_config
    assert (config.repetition_penalty, config.num_beams) in ((None, None), (1.0, 1))


def test_bad_weights_are_not_remembered_as_good(folder: Path) -> None:
    change_weights(folder, lambda weights: weights["lm_head.weight"].fill_(torch.nan))
    for _ in range(2):
        refused(folder, "lm_head.weight")


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    load_model(llama, torch.float32, CPU).save_pretrained(folder, max_shard_size="300KB")
    for path in llama.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_a_checkpoint_in_shards_is_whole(sharded: Path, llama: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert check_checkpoint(str(sharded)).dims == check_checkpoint(str(llama)).dims
    whole, parts = (prunable_weights(load_model(folder, torch.float32, CPU)) for folder in (llama, sharded))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_every_shard_is_checked(sharded: Path) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1]
    weights = load_file(last)
    name = next(iter(weights))
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, last, metadata={"format": "pt"})
    refused(sharded, f"{re.escape(name)} in .*{last.name}")
    last.unlink()
    refused(sharded, f"{last.name} is missing")


def test_seven_layers_of_each_block_are_prunable(llama: Path) -> None:
    model = load_model(llama, torch.float32, CPU)
    names = list(prunable_weights(model))
    modules = ARCHITECTURES["LlamaForCausalLM"].modules
    parts = dict.fromkeys(modules[:4], "self_attn") | dict.fromkeys(modules[4:], "mlp")
    assert names == [f"model.layers.{i}.{part}.{layer}.weight" for i in range(3) for layer, part in parts.items()]
    saved = load_file(llama / "model.safetensors")
    assert all(torch.equal(weight, saved[name]) for name, weight in prunable_weights(model).items())


@pytest.fixture(params=["llama", "mistral"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_pruned_weights_are_those_of_the_loaded_model(checkpoint: Path) -> None:
    weights = prunable_weights(load_model(checkpoint, torch.float32, CPU))
    assert pruned_weights(check_checkpoint(str(checkpoint)).dims) == sum(w.numel() for w in weights.values())


@pytest.mark.parametrize("rank", [1, 16])
def test_adapter_weights_are_those_of_the_adapted_model(rank: int, checkpoint: Path) -> None:
    model = load_model(checkpoint, torch.float32, CPU)
    adapted = adapt_model(model, Protocol(lora_rank=rank, lora_alpha=1.0), None, seed=0)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert adapter_weights(check_checkpoint(str(checkpoint)).dims, rank) == trained


@pytest.mark.parametrize(
    ("kind", "left_out", "key_value_heads", "sliding_window"),
    [(LlamaConfig, {}, 4, None), (MistralConfig, {}, 8, 4096), (MistralConfig, {"num_key_value_heads": 2}, 2, 4096)],
)
def test_sizes_that_a_config_leaves_out_are_the_defaults_of_its_class(
    kind: type, left_out: dict[str, int], key_value_heads: int, sliding_window: int | None
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    dims = ModelDims.from_config(kind(**sizes, **left_out))
    assert (dims.num_kv_heads, dims.head_dim, dims.sliding_window) == (key_value_heads, 16, sliding_window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_frozen_and_ready_to_score(dtype: torch.dtype, llama: Path) -> None:
    model = load_model(llama, dtype, CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_weights_are_copied_into_the_model(llama: Path) -> None:
    model = load_model(llama, torch.float32, CPU)
    new = {name: torch.randn_like(weight) for name, weight in prunable_weights(model).items()}
    write_weights_into(model, new)
    for name, weight in prunable_weights(model).items():
        assert torch.equal(weight, new[name])
        assert weight is not new[name]
