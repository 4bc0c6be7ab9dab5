"""What becomes of masks that change, counted from bits: by hand, and against references that look at each weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tune_sparse.pruning.bit_masks import pack_bits
from tune_sparse.pruning.mask_dynamics import (
    begin_history,
    continue_history,
    dead_counts,
    effective_ranks,
    masked_gradient_norm,
    oriented_as_linear,
    popcount,
    slope,
    summed_zero_since,
    zero_gradient_norms,
)


def bits(text: str) -> Tensor:
    return pack_bits(torch.tensor([letter == "1" for letter in text]))


def test_by_hand_one_of_two_zeros_revives() -> None:
    history = begin_history(bits("1100"))
    _, counts = continue_history(history, bits("1010"), 5)
    revived, at_either, now_or_revived = counts.tolist()
    assert (revived, 4 - at_either, 4 - now_or_revived) == (1, 1, 2)
    assert revived / (revived + 4 - at_either) == 0.5


@given(st.lists(st.booleans(), max_size=70))
def test_popcount_counts_ones(ones: list[bool]) -> None:
    assert popcount(pack_bits(torch.tensor(ones, dtype=torch.bool))) == sum(ones)


@st.composite
def recorded_masks(draw: st.DrawFn) -> list[tuple[int, list[bool]]]:
    """(step, mask) of several records of one matrix, from step 0 on."""
    size = draw(st.integers(1, 21))
    gaps = draw(st.lists(st.integers(1, 300), min_size=1, max_size=8))
    steps = [0, *np.cumsum(gaps).tolist()]
    return [(step, draw(st.lists(st.booleans(), min_size=size, max_size=size))) for step in steps]


@given(recorded_masks())
def test_counts_and_durations_are_those_of_a_look_at_each_weight(records: list[tuple[int, list[bool]]]) -> None:
    (_, before), *later = records
    history = begin_history(pack_bits(torch.tensor(before)))
    since, ever = [0] * len(before), [False] * len(before)
    for step, kept in later:
        history, counts = continue_history(history, pack_bits(torch.tensor(kept)), step)
        pairs = list(zip(before, kept, strict=True))
        since = [step if (old, new) == (True, False) else known for known, (old, new) in zip(since, pairs, strict=True)]
        ever = [known or pair == (False, True) for known, pair in zip(ever, pairs, strict=True)]
        revived, at_either, now_or_revived = counts.tolist()
        assert revived == pairs.count((False, True))
        assert len(kept) - at_either == pairs.count((False, False))
        assert len(kept) - now_or_revived == sum(not k and not e for k, e in zip(kept, ever, strict=True))
        assert summed_zero_since(history) == sum(s for s, k in zip(since, kept, strict=True) if not k)
        before = kept


def test_dead_outputs_and_inputs_are_those_of_the_linear_layer_however_it_is_stored() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert dead_counts("model.layers.0.self_attn.q_proj.weight", mask).tolist() == [1, 1]
    conv = "transformer.h.0.mlp.c_fc.weight"
    assert dead_counts(conv, torch.tensor([[True, False, False], [True, False, False]])).tolist() == [2, 0]
    assert oriented_as_linear(conv, mask).shape == (3, 2)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_effective_ranks_are_those_of_numpy(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.manual_seed(0)) * 0.6 ** torch.arange(shape[1]) ** 1.5
    singular = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    shares = singular / singular.sum()
    rank, entropy = effective_ranks(weight)
    assert rank == (singular > 0.01 * singular[0]).sum() / min(shape) < 1
    assert entropy == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_effective_ranks_of_no_direction_and_of_all() -> None:
    assert effective_ranks(torch.zeros(3, 4)) == (0.0, 0.0)
    assert effective_ranks(torch.eye(4)) == (1.0, pytest.approx(4.0))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=10))
def test_slope_is_that_of_numpy(values: list[float]) -> None:
    assert slope(values) == pytest.approx(np.polyfit(np.arange(len(values)), values, 1)[0], abs=1e-9)


def test_one_value_has_no_slope() -> None:
    assert slope([0.5]) == 0.0


def test_norms_of_zeros_are_those_of_autograd_by_the_effective_weight() -> None:
    generator = torch.manual_seed(0)
    x, weight, mask = torch.randn(8, 5, generator=generator), torch.randn(3, 5, generator=generator), torch.rand(3, 5)
    keep = mask > 0.5
    trained = (weight * keep).requires_grad_()
    torch.nn.functional.linear(x, trained).square().sum().backward()
    effective = (weight * keep).detach().requires_grad_()
    (x @ effective.T).square().sum().backward()
    assert trained.grad is not None
    assert effective.grad is not None
    expected = effective.grad[~keep].norm()
    assert masked_gradient_norm(trained.grad, keep).item() == pytest.approx(expected.item())


def test_averages_of_norms_by_hand() -> None:
    norms = zero_gradient_norms({"a": 3.0, "b": 4.0}, {"a": 9, "b": 16})
    assert norms == {
        "zero_grad_norm/a": 1.0,
        "zero_grad_norm/b": 1.0,
        "zero_grad_norm/average": 7 / 25,
        "zero_grad_norm/rms": 1.0,
    }
    assert set(zero_gradient_norms({"a": 0.0}, {"a": 0}).values()) == {0.0}
