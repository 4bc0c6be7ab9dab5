from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_masks import make_masks
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.data.batching import as_batch
from tune_sparse.data.splits import Encoded
from tune_sparse.evaluation.flops import attended_pairs, inference_flops, training_flops
from tune_sparse.lora.layer import adapt_model, count_impls
from tune_sparse.models.architectures import pruned_weights
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.masks import Masks
from tune_sparse.training.loop import answer_loss

Dense = tuple[PreTrainedModel, ModelDims]


@pytest.fixture(params=["llama", "mistral"])
def dense(request: pytest.FixtureRequest) -> Dense:
    folder: Path = request.getfixturevalue(request.param)
    return load_model(folder, torch.float32, torch.device("cpu")), check_checkpoint(str(folder)).dims


def draw_masks(dense: Dense, method: str, sparsity: float) -> Masks:
    model, dims = dense
    return make_masks(method, prunable_weights(model), dims, sparsity, seed=0)


@given(st.integers(1, 60), st.none() | st.integers(1, 80))
def test_attended_pairs_are_those_of_a_drawn_attention_pattern(tokens: int, window: int | None) -> None:
    drawn = [(q, k) for q in range(tokens) for k in range(tokens) if k <= q and (window is None or q - k < window)]
    assert attended_pairs(tokens, window) == len(drawn)


def test_attended_pairs_by_hand() -> None:
    assert attended_pairs(4, None) == 1 + 2 + 3 + 4
    assert attended_pairs(4, 2) == 1 + 2 + 2 + 2
    assert attended_pairs(4, 100) == attended_pairs(4, 4) == 10


@pytest.mark.parametrize("tokens", [1, 20, 1024])
def test_flops_of_a_dense_model_by_hand(tokens: int, dense: Dense) -> None:
    _, dims = dense
    block = 64 * 64 + 32 * 64 + 32 * 64 + 64 * 64 + 3 * 64 * 192
    pairs = sum(min(query + 1, dims.sliding_window or tokens) for query in range(tokens))
    expected = 2 * tokens * (3 * block + 64 * dims.vocab_size) + 3 * 4 * pairs * 64
    assert inference_flops(draw_masks(dense, "none", 0.0), dims, tokens) == expected


def test_flops_of_the_matrices_are_those_that_torch_counts(dense: Dense) -> None:
    model, dims = dense
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(40)[None])
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in products)
    attention = 3 * 4 * attended_pairs(40, dims.sliding_window) * 64
    assert inference_flops(draw_masks(dense, "none", 0.0), dims, 40) - attention == counted


@pytest.mark.parametrize("method", ["unstructured", "structured", "random", "random-structured"])
def test_flops_fall_with_sparsity(method: str, dense: Dense) -> None:
    flops = [inference_flops(draw_masks(dense, method, s), dense[1], 1024) for s in (0.0, 0.1, 0.5, 0.9)]
    assert flops == sorted(set(flops), reverse=True)


def test_elementwise_sparsity_saves_two_operations_a_weight_and_token(dense: Dense) -> None:
    _, dims = dense
    whole, half = (inference_flops(draw_masks(dense, "random", s), dims, 100) for s in (0.0, 0.5))
    assert whole - half == 2 * 100 * pruned_weights(dims) // 2


def test_removed_heads_save_their_attention(dense: Dense) -> None:
    _, dims = dense
    masks = draw_masks(dense, "structured", 0.5)
    kept = sum(int(mask.sum()) for mask in masks.values())
    heads_left = 4
    attention = 3 * 4 * attended_pairs(100, dims.sliding_window) * heads_left * 8
    assert inference_flops(masks, dims, 100) == 200 * (kept + 64 * dims.vocab_size) + attention


def test_heads_of_a_fused_and_transposed_matrix_are_those_of_its_queries() -> None:
    dims = ModelDims(4, 1, 2, 2, 2, 3, 5, sliding_window=None, max_positions=64, architecture="GPT2LMHeadModel")
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, :2] = False  # the queries of the first of two heads
    masks = {"transformer.h.0.attn.c_attn.weight": mask}
    assert inference_flops(masks, dims, 3) == 2 * 3 * (40 + 4 * 5) + 4 * 6 * 2


def test_a_sliding_window_makes_long_texts_cheaper() -> None:
    sizes = {
        "hidden_size": 4,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 4,
        "intermediate_size": 2,
        "vocab_size": 5,
        "max_positions": 64,
    }
    masks = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4, dtype=torch.bool)}
    unlimited, limited = ModelDims(**sizes, sliding_window=None), ModelDims(**sizes, sliding_window=3)
    assert inference_flops(masks, unlimited, 3) == inference_flops(masks, limited, 3)
    assert inference_flops(masks, unlimited, 10) - inference_flops(masks, limited, 10) == 4 * 4 * (55 - 27)


@pytest.mark.parametrize("factors", [0, 4 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192))])
def test_training_flops_by_hand(factors: int, dense: Dense) -> None:
    _, dims = dense
    masks = draw_masks(dense, "unstructured", 0.5)
    kept = sum(int(mask.sum()) for mask in masks.values())
    pairs = attended_pairs(20, dims.sliding_window) + attended_pairs(50, dims.sliding_window)
    expected = 70 * (4 * kept + (6 * factors if factors else 2 * kept))
    expected += 12 * pairs * 3 * 64 + 4 * 5 * 64 * dims.vocab_size
    assert training_flops(masks, dims, [(20, 2), (50, 3)], factors) == expected


def test_training_flops_of_plain_lora_are_those_that_torch_counts(dense: Dense) -> None:
    model, dims = dense
    masks = draw_masks(dense, "none", 0.0)
    adapted = adapt_model(model, Protocol(lora_rank=2, lora_alpha=4.0), None, seed=0)
    assert set(count_impls(adapted)) == {"plain"}
    for parameter in model.model.embed_tokens.parameters():  # or the first block needs no input gradient
        parameter.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        batch = as_batch([[Encoded(tuple(range(1, 37)), (5, 6, 7, 8))]])
        loss = answer_loss(adapted.get_base_model(), batch)
        loss.backward()
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in products)
    attention = 12 * attended_pairs(40, dims.sliding_window) * 3 * 64
    factors = sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name)
    assert training_flops(masks, dims, [(40, len(batch.targets))], factors) - attention == counted
