"""Adapters leave and come back with their meaning: a masked one is never loaded as plain LoRA."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_masks import make_masks, masked
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.errors import InputError
from tune_sparse.lora.adapter_io import MARKER, WEIGHTS, load_adapter, read_marker, save_adapter
from tune_sparse.lora.layer import adapt_model, count_impls, sparse_lora_layers
from tune_sparse.models.architectures import ARCHITECTURES
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.pruning.masks import Masks, mask_sha256

PROTOCOL = Protocol(lora_rank=4, lora_alpha=8.0, precision="float32")
IDS = torch.arange(2 * 20).view(2, 20)
Q = "model.layers.0.self_attn.q_proj.weight"

Pruned = Callable[..., tuple[PreTrainedModel, Masks]]


@pytest.fixture
def pruned(llama: Path) -> Pruned:
    """A pruned Llama and its masks; kept_zero: with a kept weight that is exactly zero."""

    def make(method: str = "unstructured", kept_zero: bool = False) -> tuple[PreTrainedModel, Masks]:
        model = load_model(llama, torch.float32, torch.device("cpu"))
        weights = prunable_weights(model)
        masks = make_masks(method, weights, check_checkpoint(str(llama)).dims, 0.5, seed=0)
        if kept_zero:
            weights[Q][0, int(masks[Q][0].nonzero()[0])] = 0
        write_weights_into(model, masked(weights, masks))
        return model, masks

    return make


def trained(model: PreTrainedModel, masks: Masks | None) -> PeftModel:
    """Adapters as if training had moved them."""
    adapted = adapt_model(model, PROTOCOL, masks, seed=0)
    for seed, (_, layer) in enumerate(sparse_lora_layers(adapted)):
        nn.init.normal_(layer.factors()[1], std=0.05, generator=torch.Generator().manual_seed(seed))
    return adapted.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("method", ["unstructured", "structured", "random"])
@pytest.mark.parametrize("kept_zero", [False, True])
def test_a_masked_adapter_comes_back_masked(method: str, kept_zero: bool, pruned: Pruned, tmp_path: Path) -> None:
    model, masks = pruned(method, kept_zero)
    adapted = trained(model, masks)
    save_adapter(adapted, tmp_path / "adapter", "sparse-to-sparse", masks)
    marker = read_marker(tmp_path / "adapter")
    assert marker is not None
    assert list(marker.kept_zeros) == ([Q] if kept_zero else [])
    loaded = load_adapter(pruned(method, kept_zero)[0], tmp_path / "adapter")
    assert count_impls(loaded) == count_impls(adapted)
    assert all(torch.equal(layer.keep_mask, masks[name]) for name, layer in sparse_lora_layers(loaded))
    assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize(("mode", "closest"), [("sparse-to-spars", "sparse-to-sparse"), ("masked-finetuning", "")])
def test_a_marker_of_an_unknown_mode_is_refused(mode: str, closest: str, pruned: Pruned, tmp_path: Path) -> None:
    model, masks = pruned()
    save_adapter(trained(model, masks), tmp_path / "adapter", mode, masks)
    with pytest.raises(InputError, match=f"unknown mode of the adapter in .*{mode}.*{closest}"):
        read_marker(tmp_path / "adapter")


def test_stock_peft_computes_something_else_with_a_masked_adapter(pruned: Pruned, tmp_path: Path) -> None:
    model, masks = pruned()
    adapted = trained(model, masks)
    save_adapter(adapted, tmp_path / "adapter", "sparse-to-sparse", masks)
    stock = PeftModel.from_pretrained(pruned()[0], str(tmp_path / "adapter")).eval()
    assert not torch.allclose(logits(stock), logits(adapted), atol=1e-2), "or no marker would be needed"


@pytest.mark.parametrize("mode", ["dense", "sparse-to-dense"])
def test_a_plain_adapter_computes_the_same_here_and_in_stock_peft(mode: str, pruned: Pruned, tmp_path: Path) -> None:
    model, masks = pruned()
    adapted = trained(model, None)
    save_adapter(adapted, tmp_path / "adapter", mode, masks)
    stock = PeftModel.from_pretrained(copy.deepcopy(adapted).unload(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(stock), logits(adapted), atol=1e-5, rtol=1e-5)
    loaded = load_adapter(pruned()[0], tmp_path / "adapter")
    assert all(layer.keep_mask is None for _, layer in sparse_lora_layers(loaded))
    assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_stock_peft_loads(rslora: bool, pruned: Pruned, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    stock = get_peft_model(pruned()[0], config).eval()
    stock.save_pretrained(str(tmp_path))
    assert read_marker(tmp_path) is None
    loaded = load_adapter(pruned()[0], tmp_path)
    assert [layer.keep_mask for _, layer in sparse_lora_layers(loaded)] == 6 * [None]
    torch.testing.assert_close(logits(loaded), logits(stock), atol=1e-5, rtol=1e-5)


def test_a_loaded_adapter_is_frozen(pruned: Pruned, tmp_path: Path) -> None:
    model, masks = pruned()
    save_adapter(trained(model, masks), tmp_path / "adapter", "sparse-to-sparse", masks)
    loaded = load_adapter(pruned()[0], tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_a_saved_adapter_says_its_mode_and_mask(pruned: Pruned, tmp_path: Path) -> None:
    model, masks = pruned()
    save_adapter(trained(model, masks), tmp_path / "adapter", "sparse-to-sparse", masks)
    marker = json.loads((tmp_path / "adapter" / MARKER).read_text())
    assert marker.pop("mask_sha256") == mask_sha256(masks)
    assert marker == {"mode": "sparse-to-sparse", "kept_zeros": {}, "trained_compact": False}
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", WEIGHTS, MARKER}


@pytest.fixture
def saved(pruned: Pruned, tmp_path: Path) -> Path:
    """A sound masked adapter, to be broken."""
    model, masks = pruned()
    save_adapter(trained(model, masks), tmp_path / "adapter", "sparse-to-sparse", masks)
    return tmp_path / "adapter"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def first(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


@pytest.mark.parametrize("mode", ["sparse-to-sparse", "sparse-to-dense"])
def test_a_model_with_other_zeros_is_refused(mode: str, saved: Path, pruned: Pruned, llama: Path) -> None:
    edit_json(saved / MARKER, mode=mode)
    dense = load_model(llama, torch.float32, torch.device("cpu"))
    for model in (dense, pruned("random")[0]):
        with pytest.raises(
            InputError, match=rf"an adapter trained {mode} belongs to the mask .* Give the model pruned"
        ):
            load_adapter(model, saved)


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / MARKER).write_text("{"), r"tune_sparse\.json must say mode and mask of its adapter"),
    (lambda f: (f / MARKER).write_text('{"mood": 1}'), r"tune_sparse\.json must say mode and mask of its adapter"),
    (lambda f: edit_json(f / MARKER, kept_zeros={"layer.weight": [1]}), r"unknown matrix of the adapter's mask 'layer"),
    (lambda f: (f / "adapter_config.json").unlink(), r"must hold an adapter in PEFT's format"),
    (lambda f: edit_json(f / "adapter_config.json", use_dora=True), r"must be plain LoRA, got LORA use_dora=True"),
    (lambda f: edit_json(f / "adapter_config.json", bias="all"), r"must be plain LoRA, got LORA bias=all"),
    (
        lambda f: edit_json(f / "adapter_config.json", target_modules=["q_proj", "qproj"]),
        r"unknown target module of the adapter 'qproj'\. Did you mean 'q_proj'",
    ),
    (
        lambda f: edit_json(f / "adapter_config.json", r=8),
        r"must fit its model, .* is \(4, \d+\) in .*, the model wants \(8, \d+\)\. Give the model that",
    ),
    (lambda f: edit_weights(f, lambda t: t.pop(first(t))), r"must fit its model, .*lora_A\.weight: .* lacks it\. Give"),
    (
        lambda f: edit_weights(f, lambda t: t.update({"x.lora_A.weight": torch.zeros(4, 4)})),
        r"must fit its model, x\.lora_A\.weight: the model has no such layer\.",
    ),
    (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        r"adapter_model\.safetensors must be a whole safetensors file: .* Copy the adapter again\.",
    ),
    (lambda f: (f / WEIGHTS).unlink(), r"adapter_model\.safetensors must be a whole safetensors file"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN, ids=lambda case: case if isinstance(case, str) else "")
def test_a_broken_adapter_is_refused(
    break_it: Callable[[Path], Any], message: str, saved: Path, pruned: Pruned
) -> None:
    break_it(saved)
    with pytest.raises(InputError, match=message):
        load_adapter(pruned()[0], saved)


def test_an_adapter_of_another_model_is_refused(saved: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, num_hidden_layers=3, intermediate_size=64, vocab_size=64)
    config.num_attention_heads = config.num_key_value_heads = 4
    edit_json(saved / MARKER, mode="dense")
    with pytest.raises(InputError, match=r"an adapter must fit its model, .* the model wants .* Give the model that"):
        load_adapter(LlamaForCausalLM(config).requires_grad_(False), saved)


def test_the_targets_are_the_prunable_layers(saved: Path) -> None:
    assert set(json.loads((saved / "adapter_config.json").read_text())["target_modules"]) == set(
        ARCHITECTURES["LlamaForCausalLM"].modules
    )
