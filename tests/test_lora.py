from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from plain_masks import make_masks, masked
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.data.splits import Encoded
from tune_sparse.lora.layer import (
    ADAPTER,
    SparseLora,
    adapt_model,
    apply_update_masks,
    count_impls,
    sparse_lora_layers,
)
from tune_sparse.lora.masked_linear import Workspace, choose_impl
from tune_sparse.models.architectures import ARCHITECTURES
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.pruning.masks import Masks
from tune_sparse.training.loop import adamw, fit

PROTOCOL = Protocol(steps=2, warmup_steps=0, global_batch_size=4, lora_rank=4, lora_alpha=8.0, precision="float32")
IDS = torch.arange(2 * 20).view(2, 20)

Adapt = Callable[..., tuple[PeftModel, Masks]]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def merged_weights(adapted: PeftModel) -> dict[str, Tensor]:
    return {name: layer.merged_weight().clone() for name, layer in sparse_lora_layers(adapted)}


def train_by_hand(adapted: PeftModel) -> None:
    """B as if training had moved it away from zero."""
    for seed, (_, layer) in enumerate(sparse_lora_layers(adapted)):
        B = layer.factors()[1]
        B.data.copy_(0.02 * draw(seed, *B.shape))


@pytest.fixture
def adapt(llama: Path) -> Adapt:
    """Make a pruned Llama with adapters whose update is not zero, and its masks."""

    def make(confined: bool, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[PeftModel, Masks]:
        model = load_model(llama, dtype, torch.device("cpu"))
        weights = prunable_weights(model)
        masks = make_masks("unstructured", weights, check_checkpoint(str(llama)).dims, 0.5, seed=0)
        write_weights_into(model, masked(weights, masks))
        protocol = Protocol(**(vars(PROTOCOL) | changes))
        adapted = adapt_model(model, protocol, masks if confined else None, seed=0)
        train_by_hand(adapted)
        return adapted.eval(), masks

    return make


def tiny(layers: int = 1, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 8,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "vocab_size": 16,
        }
        | changes
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("impl", "mask"),
    [
        ("plain", None),
        ("effective-weight", draw(3, 8, 8) > 0),
    ],
)
def test_the_forward_is_the_formula(impl: str, mask: Tensor | None, dropout: float, training: bool) -> None:
    model = tiny(attention_bias=True)
    protocol = Protocol(lora_rank=4, lora_alpha=8.0, lora_dropout=dropout)
    adapted = adapt_model(model, protocol, None, seed=0)
    layer = next(layer for name, layer in sparse_lora_layers(adapted) if "q_proj" in name)
    A, B, scaling = layer.factors()
    assert scaling == 2.0
    if mask is not None:
        layer.base_layer.weight.data *= mask
        layer.impl = choose_impl(layer.base_layer.weight, mask, 4, Workspace(), impl)
    layer.base_layer.bias.data.copy_(draw(1, 8))
    B.data.copy_(draw(2, *B.shape))
    update = 2.0 * B @ A if mask is None else 2.0 * (B @ A) * mask
    x = draw(4, 3, 5, 8)
    torch.manual_seed(11)
    expected = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    expected = expected + F.linear(F.dropout(x, dropout, training), update)
    torch.manual_seed(11)
    torch.testing.assert_close(layer.train(training)(x), expected)


@torch.no_grad()
def test_without_dropout_training_computes_with_the_weight_that_is_merged(adapt: Adapt) -> None:
    adapted, _ = adapt(confined=True)
    evaluated = adapted(IDS).logits
    assert torch.equal(adapted.train()(IDS).logits, evaluated)


def test_the_dropout_draws_again_in_every_forward() -> None:
    adapted = adapt_model(tiny(), Protocol(lora_dropout=0.5), None, seed=0)
    train_by_hand(adapted)
    adapted.train()
    assert not torch.equal(adapted(IDS[:, :9] % 16).logits, adapted(IDS[:, :9] % 16).logits)


def test_without_a_mask_the_outputs_are_those_of_stock_peft(adapt: Adapt) -> None:
    adapted, _ = adapt(confined=False)
    base = copy.deepcopy(adapted).unload()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(ARCHITECTURES["LlamaForCausalLM"].modules), task_type="CAUSAL_LM"
    )
    stock = get_peft_model(base, config).eval()
    assert not any(isinstance(module, SparseLora) for module in stock.modules())
    set_peft_model_state_dict(stock, get_peft_model_state_dict(adapted))
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, stock(IDS).logits, atol=1e-5, rtol=1e-5)
    expected = prunable_weights(stock.merge_and_unload())
    for name, weight in merged_weights(adapted).items():
        torch.testing.assert_close(weight, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_merged_masked_update_computes_the_trained_function_to_the_last_bit(dtype: torch.dtype, adapt: Adapt) -> None:
    adapted, _ = adapt(True, dtype)
    trained, merged = adapted(IDS).logits, merged_weights(adapted)
    model = adapted.unload()
    assert not torch.equal(model(IDS).logits, trained)
    write_weights_into(model, merged)
    assert torch.equal(model(IDS).logits, trained)


@torch.no_grad()
def test_a_merged_plain_update_computes_the_trained_function_but_for_rounding(adapt: Adapt) -> None:
    adapted, _ = adapt(confined=False)
    trained, merged = adapted(IDS).logits, merged_weights(adapted)
    model = adapted.unload()
    write_weights_into(model, merged)
    torch.testing.assert_close(model(IDS).logits, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "effective-weight"])
def test_the_impls_are_chosen_or_forced_and_counted(impl: str, adapt: Adapt) -> None:
    adapted, masks = adapt(confined=True, masked_lora_impl=impl)
    assert count_impls(adapted) == {"effective-weight": 21}
    adapted, _ = adapt(confined=False, masked_lora_impl=impl)
    assert count_impls(adapted) == {"effective-weight": 12, "plain": 9}
    apply_update_masks(adapted, {name: torch.ones_like(mask) for name, mask in masks.items()}, impl)
    assert count_impls(adapted) == ({"effective-weight": 12, "plain": 9} if impl == "auto" else {impl: 21})


def test_the_layers_of_a_model_share_one_workspace(adapt: Adapt) -> None:
    adapted, _ = adapt(confined=True)
    adapted(IDS).logits.sum().backward()
    [workspace] = {id(layer.impl.workspace): layer.impl.workspace for _, layer in sparse_lora_layers(adapted)}.values()
    largest = max(layer.base_layer.weight.numel() for _, layer in sparse_lora_layers(adapted))
    assert [buffer.numel() for (use, *_), buffer in workspace._buffers.items() if use == "weight"] == [largest]


@torch.no_grad()
def test_the_adapters_can_be_switched_off_and_merged_by_peft(adapt: Adapt) -> None:
    adapted, masks = adapt(confined=True)
    trained = adapted(IDS).logits
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(IDS).logits, trained, atol=1e-3)
    torch.testing.assert_close(adapted(IDS).logits, trained)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, trained, atol=1e-5, rtol=1e-5)
    assert all(not weight[~masks[name]].any() for name, weight in prunable_weights(merged).items())


def test_zeros_stay_zero_in_the_merge_of_a_confined_update(adapt: Adapt) -> None:
    adapted, masks = adapt(confined=True)
    for name, weight in merged_weights(adapted).items():
        assert torch.equal(weight == 0, ~masks[name])


def test_a_plain_update_fills_the_zeros_until_the_last_mask(adapt: Adapt) -> None:
    adapted, masks = adapt(confined=False)
    filled, final = merged_weights(adapted), masked(merged_weights(adapted), masks)
    for name, mask in masks.items():
        assert filled[name][~mask].count_nonzero() > 0.99 * (~mask).sum()
        assert not final[name][~mask].any()
        assert torch.equal(final[name][mask], filled[name][mask])


@pytest.mark.parametrize("confined", [False, True])
def test_training_moves_the_adapters_and_nothing_else(confined: bool, adapt: Adapt) -> None:
    adapted, _ = adapt(confined)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    examples = [Encoded(tuple(range(i, i + 10)), (i, i + 1)) for i in range(8)]
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    list(fit(adapted.get_base_model(), adamw(parameters, PROTOCOL), examples, PROTOCOL, seed=0))
    moved = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert len(moved) == 2 * 21


def test_the_masked_gradients_are_the_manual_ones(adapt: Adapt) -> None:
    adapted, masks = adapt(confined=True)
    name, layer = next(sparse_lora_layers(adapted))
    A, B, scaling = layer.factors()
    x, dY = draw(0, 7, 64), draw(1, 7, 64)
    layer(x).backward(dY)
    G = (dY.T @ x) * masks[name]
    torch.testing.assert_close(B.grad, scaling * G @ A.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(A.grad, scaling * B.T @ G, atol=1e-5, rtol=1e-4)
    assert layer.base_layer.weight.grad is None


def test_the_adapted_layers_are_the_prunable_ones(adapt: Adapt) -> None:
    adapted, masks = adapt(confined=True)
    assert [name for name, _ in sparse_lora_layers(adapted)] == list(masks)
    assert all(torch.equal(layer.keep_mask, masks[name]) for name, layer in sparse_lora_layers(adapted))


def first_factors(model: PreTrainedModel, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each layer before training."""
    adapted = adapt_model(model, PROTOCOL, None, seed)
    return {name: layer.factors()[:2] for name, layer in sparse_lora_layers(adapted)}


def test_adapters_begin_uniform_and_without_an_update() -> None:
    for A, B in first_factors(tiny(hidden_size=64, intermediate_size=256)).values():
        bound = 1 / math.sqrt(A.shape[1])
        assert not B.any()
        assert A.abs().max() <= bound
        assert A.abs().max() > 0.95 * bound
        assert abs(A.mean()) < 0.15 * bound


def test_adapters_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one_block = first_factors(tiny(layers=1))
    torch.manual_seed(2)
    two_blocks = first_factors(tiny(layers=2))
    other_seed = first_factors(tiny(layers=1), seed=1)
    assert len(one_block) == 7
    for name, (A, _) in one_block.items():
        assert torch.equal(A, two_blocks[name][0])
        assert not torch.equal(A, other_seed[name][0])
        assert not torch.equal(A, two_blocks[name.replace(".0.", ".1.")][0])


def test_updates_are_what_is_added_to_the_weights(adapt: Adapt) -> None:
    adapted, masks = adapt(confined=True)
    for name, layer in sparse_lora_layers(adapted):
        A, B, scaling = layer.factors()
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER), scaling * (B @ A) * masks[name])


def test_a_bfloat16_weight_stays_bfloat16_and_its_update_float32(adapt: Adapt) -> None:
    adapted, _ = adapt(confined=True, dtype=torch.bfloat16)
    assert {weight.dtype for weight in merged_weights(adapted).values()} == {torch.bfloat16}
    assert {layer.get_delta_weight(ADAPTER).dtype for _, layer in sparse_lora_layers(adapted)} == {torch.float32}
