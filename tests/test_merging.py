"""The merge in place: its statistics by hand, and what it must find."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor, nn

from tune_sparse.lora import merging
from tune_sparse.lora.layer import SparseLora
from tune_sparse.lora.masked_linear import effective_weight
from tune_sparse.lora.merging import ROUNDING, UpdateSums, any_nonzero, differs, read_flags, squared_sums, strays


def sums(update: Tensor, before: Tensor, after: Tensor, last_mask: Tensor | None = None) -> Tensor:
    return squared_sums(lambda rows: update[rows], before, after, last_mask)


def test_the_squared_sums_by_hand() -> None:
    update, before = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.ones(2, 2)
    after = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    mask = torch.tensor([[True, True], [False, False]])
    assert sums(update, before, after).tolist() == [26.0, 16.0, 0.0]
    assert sums(update, before, after, mask).tolist() == [26.0, 16.0, 1.0]
    found = UpdateSums.read([sums(update, before, after, mask), sums(update, before, before + update, mask)])
    assert found == UpdateSums(52.0, 16.0, 2.0)
    assert (found.rounded_away_fraction, found.removed_fraction) == (16 / 52, 2 / 52)


def test_nothing_is_lost_of_no_update() -> None:
    weight = torch.ones(2, 2)
    found = UpdateSums.read([sums(torch.zeros(2, 2), weight, weight)])
    assert (found.rounded_away_fraction, found.removed_fraction) == (0.0, 0.0)


def test_an_update_too_small_for_bfloat16_is_lost() -> None:
    W = torch.ones(2, 2, dtype=torch.bfloat16)
    A, B = torch.ones(1, 2), torch.tensor([[2**-10], [2**-6]])
    merged = effective_weight(W, A, B, 1.0)
    assert merged.tolist() == [[1.0, 1.0], [1 + 2**-6, 1 + 2**-6]]
    found = UpdateSums.read([sums(B @ A, W, merged)])
    assert found.rounded_away_fraction == 2**-20 / (2**-20 + 2**-12)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))
def test_rows_at_a_time_have_the_statistics_of_the_whole(seed: int, rows: int, columns: int, chunk: int) -> None:
    random = torch.Generator().manual_seed(seed)
    update, before = (torch.randn(rows, columns, generator=random) for _ in range(2))
    after, mask = (before.bfloat16() + update.bfloat16()), torch.rand(rows, columns, generator=random) > 0.5
    whole = sums(update, before, after, mask)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merging, "CHUNK", 4 * chunk)
        torch.testing.assert_close(sums(update, before, after, mask), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_must_compute_what_its_layer_does(dtype: torch.dtype) -> None:
    layer = SparseLora(nn.Linear(24, 16, dtype=dtype), "default", config=LoraConfig(r=2, lora_alpha=4), r=2)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    with torch.no_grad():
        merged = layer.merged_weight().clone()
        assert not strays(layer, merged)
        assert strays(layer, merged * (1 + 2 * ROUNDING[dtype]))
        assert strays(layer, layer.base_layer.weight)
        assert strays(layer, merged * math.nan)


def test_a_difference_is_found_wherever_it_is_and_an_equal_zero_is_none() -> None:
    weight = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    for row, column in ((0, 0), (1, 1)):
        other = weight.clone()
        other[row, column] = float("nan")
        assert read_flags({"same": differs(weight, weight.clone()), "other": differs(weight, other)}) == ["other"]
    assert not differs(weight, torch.tensor([[-0.0, 1.0], [2.0, 3.0]]))


def test_a_filled_zero_is_found_and_an_infinite_kept_weight_is_none() -> None:
    weight, dropped = torch.tensor([[float("inf"), 0.0]]), torch.tensor([[False, True]])
    assert not any_nonzero(weight, dropped)
    for value in (1.0, float("nan"), float("-inf")):
        weight[0, 1] = value
        assert any_nonzero(weight, dropped)
