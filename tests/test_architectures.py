from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tune_sparse.errors import InputError
from tune_sparse.models.architectures import (
    ARCHITECTURES,
    ATTENTION,
    GATED,
    Matrix,
    architecture_named,
    list_matrices,
    matrix_named,
    pruned_weights,
    read_weights,
)
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.streaming import open_checkpoint


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_in_memory_has_the_checkpoints_matrices(name: str, architecture_folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(architecture_folders[name]))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    assert list_matrices(model) == checkpoint.prunable.matrices
    weights = read_weights(model)
    assert list(weights) == [matrix.name for matrix in checkpoint.prunable.matrices]
    assert all(torch.equal(weights[matrix], checkpoint.tensors[matrix]) for matrix in weights)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_writing_into_a_matrix_writes_into_the_model(name: str, architecture_folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(architecture_folders[name], dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        for weight in read_weights(model).values():
            before_this = model(ids).logits
            weight.mul_(0.5)
            assert not torch.equal(model(ids).logits, before_this)
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_those_of_the_config(name: str, architecture_folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(architecture_folders[name]))
    dims = checkpoint.dims
    assert dims.architecture == name
    for matrix in checkpoint.prunable.matrices:
        assert checkpoint.prunable.shapes[matrix.name] == matrix.shape(dims)
    assert pruned_weights(dims) == sum(checkpoint.prunable.sizes.values())


def test_everything_else_is_left_alone(architecture_folders: dict[str, Path]) -> None:
    for folder in architecture_folders.values():
        checkpoint = open_checkpoint(str(folder))
        left = [name for name in checkpoint.tensors if name not in checkpoint.prunable.sizes]
        assert all(
            len(checkpoint.tensors.shapes[name]) == 1 or "gate" in name or "emb" in name or "lm_head" in name
            for name in left
            if ".wte." not in name and ".wpe." not in name
        )


def test_experts_share_the_blocks_attention_and_no_inputs() -> None:
    names = [f"model.layers.3.block_sparse_moe.experts.{e}.{w}.weight" for e in (10, 2) for w in ("w2", "w1", "w3")]
    matrices = architecture_named("MixtralForCausalLM").matrices(names)
    assert [(m.expert, m.layer[-2:]) for m in matrices] == [(e, w) for e in (2, 10) for w in ("w1", "w3", "w2")]
    assert len({m.input_key for m in matrices}) == 4
    assert matrices[0].input_key == matrices[1].input_key != matrices[3].input_key


@pytest.mark.parametrize("name", ["h.11.attn.c_attn.weight", "transformer.h.11.attn.c_attn.weight"])
def test_a_checkpoint_of_the_bare_decoder_is_known_too(name: str) -> None:
    [matrix] = architecture_named("GPT2LMHeadModel").matrices([name, "h.11.attn.c_attn.bias", "wte.weight"])
    assert matrix == Matrix(name, 11, "attn.c_attn", None, "qkv", transposed=True)


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(InputError, match=r"the class of a model must be LlamaForCausalLM or .*, got BertForMaskedLM"):
        architecture_named("BertForMaskedLM")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_has_the_matrices_that_are_expected_of_its_dims(
    name: str, architecture_folders: dict[str, Path]
) -> None:
    checkpoint = open_checkpoint(str(architecture_folders[name]))
    assert architecture_named(name).expected(checkpoint.dims) == checkpoint.prunable.matrices


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_name_alone_tells_the_matrix(name: str, architecture_folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(architecture_folders[name]))
    assert [matrix_named(matrix.name) for matrix in checkpoint.prunable.matrices] == checkpoint.prunable.matrices
    assert all(matrix_named(other) is None for other in checkpoint.tensors if other not in checkpoint.prunable.sizes)


def test_a_matrix_knows_its_module_size_and_shape() -> None:
    dims = ModelDims(6, 1, 4, 2, 3, 5, 9, sliding_window=None, max_positions=64)
    found = [matrix_named(f"model.layers.0.{layer}.weight") for layer in ATTENTION | GATED]
    assert [(m.module, m.size(dims), m.shape(dims), m.is_attention) for m in found if m] == [
        ("q_proj", (12, 6), (12, 6), True),
        ("k_proj", (6, 6), (6, 6), True),
        ("v_proj", (6, 6), (6, 6), True),
        ("o_proj", (6, 12), (6, 12), True),
        ("gate_proj", (5, 6), (5, 6), False),
        ("up_proj", (5, 6), (5, 6), False),
        ("down_proj", (6, 5), (6, 5), False),
    ]
    gpt2 = matrix_named("transformer.h.0.mlp.c_fc.weight")
    assert gpt2 is not None
    assert (gpt2.size(dims), gpt2.shape(dims)) == ((5, 6), (6, 5))


def test_a_shape_counts_the_matrices_of_its_class() -> None:
    sizes = {
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
    }
    shapes = {
        name: ModelDims(
            **sizes, vocab_size=9, sliding_window=None, max_positions=64, architecture=name, num_experts=experts
        )
        for name, experts in (("LlamaForCausalLM", 1), ("OPTForCausalLM", 1), ("MixtralForCausalLM", 4))
    }
    feed_forward = {name: pruned_weights(dims) - 4 * 64 for name, dims in shapes.items()}
    assert feed_forward == {"LlamaForCausalLM": 384, "OPTForCausalLM": 256, "MixtralForCausalLM": 4 * 384}
