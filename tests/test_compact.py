from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from plain_masks import masked
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tune_sparse.errors import InputError
from tune_sparse.models.architectures import ARCHITECTURES, pruned_weights, read_weights
from tune_sparse.pruning.compact import compact, find_structure, loadable
from tune_sparse.pruning.masks import channel_mask, kept_channels
from tune_sparse.pruning.prune_model import prune
from tune_sparse.pruning.streaming import OpenCheckpoint, open_checkpoint


def structured_masks(checkpoint: OpenCheckpoint, sparsity: float) -> dict[str, Tensor]:
    return {pruned.name: pruned.keep(0) for pruned in prune("structured", checkpoint.prunable, [sparsity])}


@torch.no_grad()
def compute_logits(folder: Path, masks: dict[str, Tensor] | None = None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in read_weights(model).items() if masks else ():
        weight.copy_(masked({name: weight}, masks)[name])
    return model(torch.arange(2 * 20).view(2, 20)).logits


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compact_checkpoint_computes_what_the_masked_model_does(
    name: str, sparsity: float, architecture_folders: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(architecture_folders[name]))
    masks = structured_masks(checkpoint, sparsity)
    dims = compact(checkpoint, masks, tmp_path / "small")
    torch.testing.assert_close(
        compute_logits(tmp_path / "small"), compute_logits(checkpoint.path, masks), atol=1e-5, rtol=1e-5
    )
    assert dims.intermediate_size < checkpoint.dims.intermediate_size
    assert pruned_weights(dims) < pruned_weights(checkpoint.dims)
    assert open_checkpoint(str(tmp_path / "small")).dims == dims
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == len(AutoTokenizer.from_pretrained(checkpoint.path))
    names = {path.name for path in (tmp_path / "small").glob("*.safetensors*")}
    assert names == {path.name for path in checkpoint.path.glob("*.safetensors*")}


def test_half_of_a_model_is_half_of_its_matrices(architecture_folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(architecture_folders["MistralForCausalLM"]))
    dims = compact(checkpoint, structured_masks(checkpoint, 0.5), tmp_path / "small")
    assert (dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.intermediate_size) == (4, 2, 8, 48)
    assert 2 * pruned_weights(dims) == pruned_weights(checkpoint.dims)


def test_heads_of_a_llama_must_divide_its_hidden_size(architecture_folders: dict[str, Path]) -> None:
    """Stock transformers refuses 3 groups of 2 heads at hidden size 64: one masked group is kept, all zero."""
    checkpoint = open_checkpoint(str(architecture_folders["LlamaForCausalLM"]))
    masks = structured_masks(checkpoint, 0.25)
    structure = loadable(checkpoint, find_structure(checkpoint.dims, checkpoint.prunable.matrices, masks))
    assert masks["model.layers.0.self_attn.k_proj.weight"].any(dim=1).sum() == 3 * 8
    assert structure.most_groups == 4
    assert structure.most_channels < 96


def masks_of_sizes(checkpoint: OpenCheckpoint, groups: list[int], channels: list[int]) -> dict[str, Tensor]:
    """By block, masks that keep the last so many groups and channels."""
    dims = checkpoint.dims
    masks = {}
    for matrix in checkpoint.prunable.matrices:
        kept = torch.arange(dims.num_kv_heads) >= dims.num_kv_heads - groups[matrix.block]
        left = torch.arange(dims.intermediate_size) >= dims.intermediate_size - channels[matrix.block]
        masks[matrix.name] = channel_mask(matrix, dims, kept_channels(matrix, dims, kept, left)).contiguous()
    return masks


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_blocks_of_different_sizes_are_filled_up_to_the_largest(
    name: str, architecture_folders: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(architecture_folders[name]))
    masks = masks_of_sizes(checkpoint, groups=[1, 3], channels=[40, 7])
    dims = compact(checkpoint, masks, tmp_path / "small")
    assert dims.intermediate_size == 40
    assert dims.num_kv_heads == (3 if name == "MistralForCausalLM" else 8)
    torch.testing.assert_close(
        compute_logits(tmp_path / "small"), compute_logits(checkpoint.path, masks), atol=1e-5, rtol=1e-5
    )


def test_masks_that_are_not_structured_are_refused(architecture_folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(architecture_folders["LlamaForCausalLM"]))
    name = "model.layers.1.mlp.up_proj.weight"
    for change in ("a weight", "a line"):
        masks = structured_masks(checkpoint, 0.5)
        mask = masks[name].clone()
        if change == "a weight":
            mask[0, 0] ^= True
        else:
            mask[mask.any(dim=1).nonzero()[0]] = False
        with pytest.raises(InputError, match=rf"whole heads and channels are masked, {re.escape(name)} keeps a part"):
            compact(checkpoint, masks | {name: mask}, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
