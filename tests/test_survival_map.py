from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune

from tune_sparse.errors import InputError
from tune_sparse.models.float_bits import BITS, is_finite
from tune_sparse.pruning.masks import keep_highest, pruned_count
from tune_sparse.pruning.survival_map import (
    MAX_LEVELS,
    group_survival_map,
    pack,
    row_survival_map,
    survival_map,
    unpack,
)

DTYPES = sorted(BITS, key=str)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Small matrices with many ties, of either sign, from the smallest to large numbers."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = st.sampled_from([0.0, -0.0, 1e-7, -1e-3, 0.5, -0.5, 0.501, 1.0, -1.0, 3.0, 60000.0])
    drawn = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(drawn).to(draw(st.sampled_from(DTYPES))).view(rows, columns)


sparsity_lists = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=MAX_LEVELS).map(sorted)


def plain_levels(scores: Tensor, counts: list[int]) -> Tensor:
    """The definition, a level at a time."""
    return torch.stack([keep_highest(scores.abs(), count) for count in counts]).sum(0).to(torch.uint8)


@settings(deadline=None)
@given(matrices(), sparsity_lists)
def test_one_pass_gives_what_the_plain_definition_gives(scores: Tensor, sparsities: list[float]) -> None:
    counts = [pruned_count(scores.numel(), sparsity) for sparsity in sparsities]
    levels = survival_map(scores, counts)
    assert levels.dtype == torch.uint8
    assert torch.equal(levels, plain_levels(scores, counts))
    assert [int((levels <= k).sum()) for k in range(len(counts))] == counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 900), (1, 300_001)])
def test_matrices_of_several_chunks(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    counts = [pruned_count(scores.numel(), level / 10) for level in range(1, 10)]
    assert torch.equal(survival_map(scores, counts), plain_levels(scores, counts))


def test_a_matrix_of_equal_scores_loses_its_first_positions() -> None:
    levels = survival_map(torch.full((2, 3), 0.5, dtype=torch.bfloat16), [1, 3, 5])
    assert levels.tolist() == [[0, 1, 1], [2, 2, 3]]


def test_a_transposed_view_counts_its_own_positions() -> None:
    view = torch.tensor([[1.0, 9.0], [1.0, 9.0], [1.0, 9.0]]).T
    assert survival_map(view, [2]).tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("amount", [1, 7, 30, 34])
def test_counts_are_those_of_torch(amount: int) -> None:
    layer = torch.nn.Linear(5, 7)
    layer.weight.data = torch.randint(-2, 3, (7, 5), generator=torch.Generator().manual_seed(0)).float()
    zeros = int((prune.l1_unstructured(layer, "weight", amount=amount).weight_mask == 0).sum())
    assert int((survival_map(layer.weight_orig.detach(), [amount]) == 0).sum()) == zeros == amount


def plain_row_levels(scores: Tensor, counts: list[int], transposed: bool) -> Tensor:
    """Rows lose an equal share, lowest first; the rest goes to the rows whose next score is lowest."""
    rows, width = scores.shape
    levels = torch.zeros(rows, width, dtype=torch.uint8)
    for count in counts:
        share, rest = divmod(count, rows)
        keep = torch.stack([keep_highest(row, share) for row in scores])
        following = []
        for r in range(rows):
            left = [c for c in range(width) if keep[r, c]]
            column = min(left, key=lambda c: (scores[r, c].item(), c))
            position = column * rows + r if transposed else r * width + column
            following.append((scores[r, column].item(), position, r, column))
        for _, _, r, column in sorted(following)[:rest]:
            keep[r, column] = False
        levels += keep
    return levels


@settings(deadline=None)
@given(matrices(), sparsity_lists, st.booleans())
def test_rows_share_the_count_and_the_rest_goes_in_the_strict_order(
    scores: Tensor, sparsities: list[float], transposed: bool
) -> None:
    scores = scores.abs()
    counts = [pruned_count(scores.numel(), sparsity) for sparsity in sparsities]
    levels = row_survival_map(scores, counts, transposed)
    assert torch.equal(levels, plain_row_levels(scores, counts, transposed))
    for level, count in enumerate(counts):
        lost = (levels <= level).sum(dim=1)
        assert int(lost.sum()) == count
        assert int(lost.max() - lost.min()) <= 1


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([(2, 4), (4, 8)]), st.integers(0, 99))
def test_groups_keep_their_highest(rows: int, groups: int, pattern: tuple[int, int], seed: int) -> None:
    kept, group = pattern
    scores = torch.randint(0, 4, (rows, groups * group), generator=torch.Generator().manual_seed(seed)).float()
    levels = group_survival_map(scores, group, kept)
    for mask, values in zip(levels.view(-1, group), scores.view(-1, group), strict=True):
        assert torch.equal(mask.bool(), keep_highest(values, group - kept))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 99))
def test_a_packed_map_is_half_a_byte_a_weight_and_comes_back(size: int, seed: int) -> None:
    levels = torch.randint(0, 16, (size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(levels)
    assert packed.numel() == math.ceil(levels.numel() / 2)
    assert torch.equal(unpack(packed, levels.shape), levels)


def test_a_packed_map_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"of \(3, 3\) must have 5 bytes, got 4\. Make the masks again"):
        unpack(torch.zeros(4, dtype=torch.uint8), (3, 3))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(600, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    tensor[-1, -1] = value
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_number_is_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))


def test_the_example_of_the_docstring() -> None:
    scores = torch.tensor([0.1, 0.4, 0.2, 0.4, 0.3, 0.9])
    assert survival_map(scores, [2, 4]).tolist() == [0, 1, 0, 2, 1, 2]
