from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from plain_masks import make_masks

from tune_sparse.errors import InputError
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning import masks, methods, scores
from tune_sparse.pruning.calibration import CalibrationStats
from tune_sparse.pruning.masks import group_norms
from tune_sparse.pruning.scores import Needs, Score, ScoreInputs, magnitude, random, taylor, wanda


def test_magnitude_is_the_absolute_value() -> None:
    weight = torch.tensor([[-2.0, 0.0, 1.5], [0.25, -0.0, -7.0]])
    assert magnitude(weight, ScoreInputs("w")).tolist() == [[2.0, 0.0, 1.5], [0.25, 0.0, 7.0]]


def test_random_depends_on_seed_and_name_alone() -> None:
    weight = torch.ones(30, 40)
    first = random(weight, ScoreInputs("a", 0))
    torch.manual_seed(123)
    assert torch.equal(random(weight * -3, ScoreInputs("a", 0)), first)
    assert not torch.equal(random(weight, ScoreInputs("a", 1)), first)
    assert not torch.equal(random(weight, ScoreInputs("b", 0)), first)


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    random(torch.ones(5, 5), ScoreInputs("a", 0))
    assert torch.equal(torch.rand(3), expected)


def test_random_is_uniform_in_zero_to_one() -> None:
    drawn = random(torch.empty(100, 100), ScoreInputs("a", 0))
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
    torch.testing.assert_close(group_norms(*parts), torch.tensor(expected, dtype=torch.float64))


def test_group_norms_of_bfloat16_are_summed_in_float64() -> None:
    norm = group_norms(torch.ones(1, 1000, dtype=torch.bfloat16))
    torch.testing.assert_close(norm, torch.tensor([math.sqrt(1000)], dtype=torch.float64))


def test_groups_are_normed_in_parts_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(40, 33, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    whole = group_norms(*parts)
    monkeypatch.setattr(masks, "SCORES_AT_ONCE", 7 * 66)
    assert torch.equal(group_norms(*parts), whole)


def test_wanda_and_taylor_by_hand() -> None:
    weight = torch.tensor([[-2.0, 1.0], [0.5, -3.0]])
    known = ScoreInputs("w", input_norms=torch.tensor([3.0, 0.5]), gradients=torch.tensor([[1.0, 0.0], [4.0, 2.0]]))
    assert wanda(weight, known).tolist() == [[6.0, 0.5], [1.5, 1.5]]
    assert taylor(weight, known).tolist() == [[2.0, 0.0], [2.0, 6.0]]
    assert scores.gradient(weight, known).tolist() == [[1.0, 0.0], [4.0, 2.0]]


def test_every_score_of_the_table_makes_methods_and_no_other() -> None:
    assert {method.score for method in methods.METHODS.values()} == set(scores.SCORES)


def add_score(monkeypatch: pytest.MonkeyPatch, name: str, score: Score) -> dict[str, methods.Method]:
    monkeypatch.setitem(scores.SCORES, name, score)
    added = methods.methods_from_scores([name])
    for method in added:
        monkeypatch.setitem(methods.METHODS, method, added[method])
    return added


UP = "model.layers.0.mlp.up_proj.weight"
SMALL = ModelDims(2, 1, 1, 1, 2, 2, 9, sliding_window=None, max_positions=8)


def test_a_new_score_is_a_function_and_a_table_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    added = add_score(monkeypatch, "inverse", Score(lambda weight, inputs: 1 / (1 + weight.abs())))
    assert [*added] == [
        *("inverse", "inverse-structured", "inverse-2:4", "inverse-4:8", "inverse-global", "inverse-owl", "inverse-erk")
    ]
    assert [name for name, method in added.items() if method.is_calibrated] == ["inverse-owl"]
    found = make_masks("inverse", {UP: torch.tensor([[1.0, -4.0], [2.0, 3.0]])}, SMALL, 0.5, seed=0)
    assert found[UP].int().tolist() == [[1, 0], [1, 0]]


def test_the_entry_of_a_new_score_states_what_it_needs_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Score(
        lambda weight, inputs: inputs.gradients.square(),  # type: ignore[union-attr]
        Needs(gradients=True),
        by_row=True,
        refuses={"global": "rows alone compare", "structured": "rows alone compare"},
    )
    added = add_score(monkeypatch, "fisher", entry)
    assert [*added] == ["fisher", "fisher-2:4", "fisher-4:8", "fisher-owl", "fisher-erk"]
    assert all(method.needs.gradients for method in added.values())
    statistics = CalibrationStats(gradients={UP: torch.tensor([[5.0, 4.0], [1.0, 2.0]])})
    found = make_masks("fisher", {UP: torch.ones(2, 2)}, SMALL, 0.5, seed=0, statistics=statistics)
    assert found[UP].int().tolist() == [[1, 0], [0, 1]], "each row loses its lowest"
    with pytest.raises(InputError, match=r"got 'fisher-global': rows alone compare\. Choose another"):
        methods.method_named("fisher-global")


def test_scores_and_methods_load_no_torch() -> None:
    code = "import tune_sparse.pruning.methods, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
