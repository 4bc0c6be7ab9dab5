from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.models.architectures import Matrix
from tune_sparse.pruning.allocation import erk, global_order, outlier_fraction, owl, uniform
from tune_sparse.pruning.masks import keep_highest, pruned_count


def test_uniform_rounds_each_matrix() -> None:
    assert uniform({"a": 10, "b": 7}, [0.3, 0.5]) == {"a": [3, 5], "b": [2, 4]}


@st.composite
def models(draw: st.DrawFn) -> dict[str, Tensor]:
    """Matrices with many ties, within and between them."""
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    values = st.sampled_from([0.0, 0.5, -0.5, 0.5001, 1.0, 2.0])
    return {
        name: torch.tensor(draw(st.lists(values, min_size=2, max_size=12)), dtype=dtype)[None]
        for name in "abc"[: draw(st.integers(1, 3))]
    }


@settings(deadline=None)
@given(models(), st.lists(st.floats(0, 0.99), min_size=1, max_size=4).map(sorted))
def test_global_counts_are_those_of_one_long_matrix(model: dict[str, Tensor], sparsities: list[float]) -> None:
    together = torch.cat([weight.flatten() for weight in model.values()]).abs()
    sizes = {name: weight.numel() for name, weight in model.items()}
    expected: dict[str, list[int]] = {name: [] for name in model}
    for sparsity in sparsities:
        keep = keep_highest(together, pruned_count(together.numel(), sparsity))
        for name, part in zip(model, keep.split(list(sizes.values())), strict=True):
            expected[name].append(int((~part).sum()))
    if any(pruned == sizes[name] for name, counts in expected.items() for pruned in counts):
        with pytest.raises(InputError, match=r"no layer may be 100% sparse: at sparsity .+ would lose all its"):
            global_order(sizes, sparsities, model.__getitem__)
    else:
        assert global_order(sizes, sparsities, model.__getitem__) == expected


def matrix(block: int) -> Matrix:
    return Matrix(f"layers.{block}.w", block, "w", None, "up", transposed=False)


def test_owl_by_hand() -> None:
    matrices = [matrix(0), matrix(1), matrix(2)]
    sizes = {m.name: 1000 for m in matrices}
    counts = owl(matrices, sizes, [0.5], outliers=[0.0, 0.01, 0.03])
    # relative 0, 1/3, 1; mean 4/9; density shifted by 2 * 0.08 * (relative - mean)
    assert [counts[m.name] for m in matrices] == [[571], [518], [411]]


def test_owl_without_differences_is_uniform() -> None:
    matrices = [matrix(0), matrix(1)]
    sizes = {m.name: 100 for m in matrices}
    assert owl(matrices, sizes, [0.3, 0.7], [0.02, 0.02]) == uniform(sizes, [0.3, 0.7])


@given(
    st.lists(st.floats(0, 0.2), min_size=2, max_size=6),
    st.lists(st.floats(0.01, 0.99), min_size=2, max_size=5).map(sorted),
)
def test_owl_keeps_the_mean_stays_nested_and_empties_nothing(outliers: list[float], sparsities: list[float]) -> None:
    matrices = [matrix(block) for block in range(len(outliers))]
    sizes = {m.name: 10_000 for m in matrices}
    counts = owl(matrices, sizes, sparsities, outliers)
    for level, sparsity in enumerate(sparsities):
        lost = [counts[m.name][level] for m in matrices]
        assert all(0 <= count < 10_000 for count in lost)
        assert abs(sum(lost) / (10_000 * len(lost)) - sparsity) < 1e-3
    assert all(levels == sorted(levels) for levels in counts.values())


def test_outliers_by_hand() -> None:
    scores = [torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 20.0]])]
    assert outlier_fraction(lambda: scores) == 1 / 8


SHAPES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6)


@settings(deadline=None)
@given(SHAPES, st.lists(st.floats(0, 0.99), min_size=1, max_size=4).map(sorted))
def test_erk_counts_are_exact_in_total_nested_and_in_proportion_to_the_sides(
    sides: list[tuple[int, int]], sparsities: list[float]
) -> None:
    shapes = dict(zip("abcdef", sides, strict=False))
    try:
        counts = erk(shapes, sparsities)
    except InputError:  # a matrix would lose everything
        reject()
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    for level, sparsity in enumerate(sparsities):
        pruned = {name: found[level] for name, found in counts.items()}
        assert sum(pruned.values()) == pruned_count(sum(sizes.values()), sparsity)
        of_side = {name: (sizes[name] - pruned[name]) / sum(shapes[name]) for name in shapes if pruned[name]}
        for a, b in combinations(of_side, 2):
            assert abs(of_side[a] - of_side[b]) <= 0.5 / sum(shapes[a]) + 0.5 / sum(shapes[b]) + 1e-9
        for name in shapes.keys() - of_side.keys():
            assert all(sizes[name] / sum(shapes[name]) <= rate + 1 / sum(shapes[name]) for rate in of_side.values())
    assert all(found == sorted(found) for found in counts.values())


def test_erk_by_hand() -> None:
    # 30 of 60 weights for sides of 6, 12 and 12: epsilon is 1
    assert erk({"a": (4, 2), "b": (10, 2), "c": (8, 4)}, [0.0, 0.5]) == {"a": [0, 2], "b": [0, 8], "c": [0, 20]}


def test_by_erk_a_small_matrix_stays_dense() -> None:
    counts = erk({"small": (4, 4), "large": (40, 40)}, [0.5])
    assert counts == {"small": [0], "large": [808]}
    with pytest.raises(
        InputError, match=r"no layer may be 100% sparse: at sparsity 0\.999 small would lose all its 1 "
    ):
        erk({"small": (1, 1), "large": (400, 400)}, [0.999])
