from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from tune_sparse.errors import InputError
from tune_sparse.models.architectures import architecture_named
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.masks import (
    MaskedWeights,
    channel_mask,
    count_sparsity,
    group_norms,
    keep_highest,
    kept_channels,
    mask_into,
    mask_sha256,
    pruned_count,
    structured_counts,
)
from tune_sparse.pruning.methods import TOLERANCE


def block_masks(dims: ModelDims, groups: Tensor, channels: Tensor) -> dict[str, Tensor]:
    """Masks of one block's matrices, by layer name."""
    architecture = architecture_named(dims.architecture)
    names = (f"{architecture.blocks}.0.{layer}.weight" for layer in architecture.layers)
    return {
        matrix.layer.rsplit(".", 1)[-1]: channel_mask(matrix, dims, kept_channels(matrix, dims, groups, channels))
        for matrix in architecture.matrices(names)
    }


GQA = ModelDims(
    hidden_size=3,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    intermediate_size=3,
    vocab_size=10,
    sliding_window=None,
    max_positions=64,
)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Small matrices with many ties."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(-2, 2), min_size=rows * columns, max_size=rows * columns))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return torch.tensor(values, dtype=dtype).view(rows, columns)


@pytest.mark.parametrize(
    ("pruned", "kept"),
    [
        (0, [[1, 1, 1], [1, 1, 1]]),
        (1, [[1, 0, 1], [1, 1, 1]]),
        (2, [[1, 0, 1], [0, 1, 1]]),
        (3, [[1, 0, 1], [0, 1, 0]]),
        (4, [[1, 0, 0], [0, 1, 0]]),
        (5, [[0, 0, 0], [0, 1, 0]]),
    ],
)
def test_ties_prune_the_earlier_position(pruned: int, kept: list[list[int]]) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 1.0]])
    assert keep_highest(scores, pruned).int().tolist() == kept


def test_positions_are_counted_in_the_checkpoint_layout_of_a_transposed_matrix() -> None:
    transposed = torch.tensor([[1.0, 9.0], [1.0, 9.0], [1.0, 9.0]]).T
    assert keep_highest(transposed, 2).int().tolist() == [[0, 0, 1], [1, 1, 1]]


@settings(deadline=None)
@given(matrices(), st.floats(0, 1, exclude_max=True))
def test_a_mask_has_exactly_the_asked_zeros_in_the_strict_order(scores: Tensor, sparsity: float) -> None:
    pruned = pruned_count(scores.numel(), sparsity)
    keep = keep_highest(scores, pruned)
    assert keep.dtype == torch.bool
    assert keep.shape == scores.shape
    assert int((~keep).sum()) == pruned
    order = [(score.item(), position) for position, score in enumerate(scores.flatten())]
    gone = [key for key, kept in zip(order, keep.flatten(), strict=True) if not kept]
    left = [key for key, kept in zip(order, keep.flatten(), strict=True) if kept]
    assert max(gone, default=(float("-inf"), 0)) < min(left)


@settings(deadline=None)
@given(matrices(), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_sparser_mask_is_inside_a_denser_one(scores: Tensor, a: float, b: float) -> None:
    denser, sparser = (keep_highest(scores, pruned_count(scores.numel(), s)) for s in sorted((a, b)))
    assert bool((sparser <= denser).all())


@pytest.mark.parametrize("pruned", [1, 7, 30, 34])
def test_magnitude_masks_agree_with_torch_where_there_are_no_ties(pruned: int) -> None:
    layer = nn.Linear(5, 7)
    layer.weight.data = torch.randperm(35, generator=torch.Generator().manual_seed(0)).float().view(7, 5) - 17.25
    expected = prune.l1_unstructured(layer, "weight", amount=pruned).weight_mask.bool()
    assert torch.equal(keep_highest(layer.weight_orig.detach().abs(), pruned), expected)


@pytest.mark.parametrize(
    ("total", "sparsity", "pruned"),
    [(10, 0.0, 0), (10, 0.3, 3), (7, 0.3, 2), (7, 0.4, 3), (3, 0.5, 2), (10, 0.96, 9), (2, 0.9, 1), (1, 0.9, 0)],
)
def test_pruned_count_rounds_and_leaves_one(total: int, sparsity: float, pruned: int) -> None:
    assert pruned_count(total, sparsity) == pruned


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True))
def test_pruned_count_never_empties_a_layer(total: int, sparsity: float) -> None:
    pruned = pruned_count(total, sparsity)
    assert 0 <= pruned < total
    assert abs(pruned - sparsity * total) <= 0.5 or pruned == total - 1


@st.composite
def model_dims(draw: st.DrawFn) -> ModelDims:
    key_value_heads = draw(st.integers(1, 8))
    return ModelDims(
        hidden_size=draw(st.integers(1, 16)),
        num_layers=1,
        num_heads=key_value_heads * draw(st.integers(1, 4)),
        num_kv_heads=key_value_heads,
        head_dim=draw(st.integers(1, 4)),
        intermediate_size=draw(st.integers(1, 300)),
        vocab_size=10,
        sliding_window=None,
        max_positions=2048,
    )


@settings(deadline=None)
@given(model_dims(), st.floats(0, 1, exclude_max=True))
def test_structured_sparsity_is_within_tolerance_or_refused(dims: ModelDims, sparsity: float) -> None:
    try:
        groups, channels = structured_counts(dims, sparsity)
    except InputError:
        return
    assert 0 <= groups < dims.num_kv_heads
    assert 0 <= channels < dims.intermediate_size
    masks = block_masks(
        dims, torch.arange(dims.num_kv_heads) >= groups, torch.arange(dims.intermediate_size) >= channels
    )
    assert abs(count_sparsity(masks) - sparsity) <= TOLERANCE + 1e-9


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_blocks_of_7b_models_reach_the_sparsities_of_the_matrix(sparsity: float) -> None:
    llama = ModelDims(4096, 32, 32, 32, 128, 11008, 32000, None, 2048)
    mistral = ModelDims(4096, 32, 32, 8, 128, 14336, 32000, 4096, 32768)
    for dims in (llama, mistral):
        groups, channels = structured_counts(dims, sparsity)
        assert abs(groups / dims.num_kv_heads - sparsity) <= 0.5 / dims.num_kv_heads
        assert abs(channels / dims.intermediate_size - sparsity) < 0.05


def test_a_block_too_small_for_a_sparsity_is_refused_with_its_numbers() -> None:
    tiny = ModelDims(
        hidden_size=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=3,
        vocab_size=9,
        sliding_window=None,
        max_positions=64,
    )
    message = "within 0.01 of the target: with 1 key/value groups and 3 channels a block reaches 0.286, got 0.5. Choose"
    with pytest.raises(InputError, match=re.escape(message)):
        structured_counts(tiny, 0.5)


def test_a_key_value_group_falls_with_its_queries_and_output_columns() -> None:
    masks = block_masks(GQA, torch.tensor([True, False]), torch.tensor([True, False, True]))
    queries, keys, channels = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1]
    assert {name: mask.int().tolist() for name, mask in masks.items()} == {
        "q_proj": [[bit] * 3 for bit in queries],
        "k_proj": [[bit] * 3 for bit in keys],
        "v_proj": [[bit] * 3 for bit in keys],
        "o_proj": [queries] * 3,
        "gate_proj": [[bit] * 3 for bit in channels],
        "up_proj": [[bit] * 3 for bit in channels],
        "down_proj": [channels] * 3,
    }


def test_masked_weights_are_made_when_they_are_asked_for() -> None:
    weights = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)}
    result = MaskedWeights(weights, {"a": torch.tensor([[True, False], [False, True]])})
    assert list(result) == ["a"]
    assert len(result) == 1
    assert result["a"].tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert result["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("is_view", [False, True])
def test_a_weight_is_masked_in_place_with_the_bits_of_a_product(dtype: torch.dtype, is_view: bool) -> None:
    weight, mask = (
        torch.tensor([[1.5, -2.0, 0.0], [-0.0, -3.0, 4.0]], dtype=dtype),
        torch.tensor([[1, 0, 1], [0, 1, 0]]),
    )
    weight, mask = (weight.T, mask.T) if is_view else (weight, mask)
    product = weight * mask.bool()
    mask_into(weight, mask.bool())
    assert torch.equal(weight, product)
    assert torch.equal(weight.signbit(), product.signbit())


def test_norms_that_nearly_tie_are_ordered_whatever_the_order_of_their_additions() -> None:
    row = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    larger = row.clone()
    larger[7] *= 1 + 1e-6
    norms = group_norms(torch.stack([larger, row, row.flip(0)]))
    assert norms.argsort(stable=True)[-1] == 0


def test_sparsity_is_counted_over_all_matrices() -> None:
    masks = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[False, False, True, True, True, True]])}
    assert count_sparsity(masks) == 3 / 8


def checksum(**masks: list[list[int]]) -> str:
    return mask_sha256({name: torch.tensor(mask, dtype=torch.bool) for name, mask in masks.items()})


def test_the_checksum_does_not_depend_on_the_order_of_matrices() -> None:
    assert checksum(a=[[1, 0]], b=[[1, 1]]) == checksum(b=[[1, 1]], a=[[1, 0]])


@pytest.mark.parametrize(
    "other",
    [
        {"a": [[1, 0, 1], [1, 1, 0]], "b": [[1]]},
        {"aa": [[1, 0, 1], [1, 1, 1]], "b": [[1]]},
        {"a": [[1, 0], [1, 1], [1, 1]], "b": [[1]]},
        {"a": [[1, 0, 1, 1, 1, 1]], "b": [[1]]},
        {"a": [[1, 0, 1], [1, 1, 1]], "b": [[0]]},
        {"a": [[1, 0, 1], [1, 1, 1]]},
    ],
    ids=["a bit", "a name", "a transposed shape", "a flat shape", "a bit of another matrix", "a matrix less"],
)
def test_the_checksum_changes_with(other: dict[str, list[list[int]]]) -> None:
    assert checksum(a=[[1, 0, 1], [1, 1, 1]], b=[[1]]) != checksum(**other)


@settings(deadline=None)
@given(matrices(), st.data())
def test_the_checksum_changes_with_any_one_bit(scores: Tensor, data: st.DataObject) -> None:
    mask = scores > 0
    flipped = mask.clone()
    position = data.draw(st.integers(0, mask.numel() - 1))
    flipped.view(-1)[position] ^= True
    assert mask_sha256({"a": mask}) != mask_sha256({"a": flipped})


def test_the_checksum_of_a_view_is_that_of_its_values() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert mask_sha256({"a": mask.T}) == mask_sha256({"a": mask.T.contiguous()})
