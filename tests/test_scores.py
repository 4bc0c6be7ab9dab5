from __future__ import annotations

import math

import pytest
import torch

from tune_sparse.pruning import methods, scores
from tune_sparse.pruning.scores import Known, group_norms, magnitude, random, taylor, wanda


def test_magnitude_is_the_absolute_value() -> None:
    weight = torch.tensor([[-2.0, 0.0, 1.5], [0.25, -0.0, -7.0]])
    assert magnitude(weight, Known("w")).tolist() == [[2.0, 0.0, 1.5], [0.25, 0.0, 7.0]]


def test_random_depends_on_seed_and_name_alone() -> None:
    weight = torch.ones(30, 40)
    first = random(weight, Known("a", 0))
    torch.manual_seed(123)
    assert torch.equal(random(weight * -3, Known("a", 0)), first)
    assert not torch.equal(random(weight, Known("a", 1)), first)
    assert not torch.equal(random(weight, Known("b", 0)), first)


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    random(torch.ones(5, 5), Known("a", 0))
    assert torch.equal(torch.rand(3), expected)


def test_random_is_uniform_in_zero_to_one() -> None:
    drawn = random(torch.empty(100, 100), Known("a", 0))
    assert drawn.shape == (100, 100)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    torch.testing.assert_close(drawn.quantile(torch.arange(0.1, 1, 0.1)), torch.arange(0.1, 1, 0.1), atol=0.02, rtol=0)


def test_group_norms_by_hand() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    columns = torch.tensor([[4.0], [0.0]])
    assert group_norms(rows, columns).tolist() == [5.0, 1.0]


def test_group_norms_equal_the_norm_computed_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, *rest, generator=generator) for rest in ((3,), (2, 5), (6, 1))]
    expected = [math.sqrt(sum(w.item() ** 2 for part in parts for w in part[group].flatten())) for group in range(4)]
    torch.testing.assert_close(group_norms(*parts), torch.tensor(expected))


def test_group_norms_of_bfloat16_are_summed_in_float32() -> None:
    norm = group_norms(torch.ones(1, 1000, dtype=torch.bfloat16))
    torch.testing.assert_close(norm, torch.tensor([math.sqrt(1000)]))


def test_groups_are_normed_in_parts_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(40, 33, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    whole = group_norms(*parts)
    monkeypatch.setattr(scores, "SCORES_AT_ONCE", 7 * 66)
    assert torch.equal(group_norms(*parts), whole)


def test_wanda_and_taylor_by_hand() -> None:
    weight = torch.tensor([[-2.0, 1.0], [0.5, -3.0]])
    known = Known("w", input_norms=torch.tensor([3.0, 0.5]), gradients=torch.tensor([[1.0, 0.0], [4.0, 2.0]]))
    assert wanda(weight, known).tolist() == [[6.0, 0.5], [1.5, 1.5]]
    assert taylor(weight, known).tolist() == [[2.0, 0.0], [2.0, 6.0]]
    assert scores.gradient(weight, known).tolist() == [[1.0, 0.0], [4.0, 2.0]]


def test_every_score_that_a_method_names_is_in_the_table() -> None:
    assert {*scores.SCORES, "sparsegpt"} == set(methods.SCORES)
