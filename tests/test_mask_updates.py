"""Cuts, drops and growth of one matrix, in the strict order (score, position), and their counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune

from tune_sparse.errors import InputError
from tune_sparse.pruning.allocation import erk
from tune_sparse.pruning.mask_updates import (
    counts_by_shape,
    cut,
    drop_count,
    global_counts,
    highest,
    lowest,
    random_growth,
    regrow,
    select,
)
from tune_sparse.pruning.masks import keep_highest, pruned_count

shapes = st.tuples(st.integers(1, 6), st.integers(2, 9))
values = st.sampled_from([0.0, -0.0, 1e-38, 0.5, -0.5, 0.501, -1.0, 3.0])


@st.composite
def masked_matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(weight, mask) with many ties, and kept weights of 0 among them; at least one is kept."""
    shape = draw(shapes)
    size = shape[0] * shape[1]
    numbers = torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).view(shape)
    keep = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(shape)
    keep.view(-1)[draw(st.integers(0, size - 1))] = True
    return numbers * keep, keep


def plain_lowest(scores: Tensor, among: Tensor, count: int) -> set[int]:
    """The definition."""
    places = [place for place in range(among.numel()) if among.flatten()[place]]
    return set(sorted(places, key=lambda place: (abs(float(scores.flatten()[place])), place))[:count])


def places(marked: Tensor) -> set[int]:
    return set(marked.flatten().nonzero().squeeze(1).tolist())


def test_by_hand() -> None:
    weight = torch.tensor([[0.3, 0.0, -0.1, 0.2], [0.0, 0.1, 0.0, -0.9]])
    keep = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]).bool()
    assert places(lowest(weight, keep, 1)) == {2}  # -0.1 is as small as 0.1, and earlier
    assert places(cut(weight, keep, kept=5, pruned=5).keep) == {0, 3, 7}
    gradient = torch.tensor([[0.0, 0.5, 9.0, 0.0], [0.5, 0.0, 0.1, 0.0]])
    change = regrow(weight, keep, kept=5, dropped=2, growth=gradient)
    assert places(change.survivors) == {0, 3, 7}
    assert places(change.grown) == {2, 4}  # the dropped 2 comes back; of the two 0.5 the later one is the higher
    assert places(select(weight, keep, pruned=6).keep) == {0, 7}


@settings(deadline=None)
@given(masked_matrices(), st.data())
def test_a_cut_takes_the_lowest_of_the_kept_to_the_exact_count(
    matrix: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    weight, keep = matrix
    kept, size = int(keep.sum()), keep.numel()
    pruned = data.draw(st.integers(size - kept, size - 1))
    change = cut(weight, keep, kept, pruned)
    assert int((~change.keep).sum()) == pruned
    assert not (change.keep & ~keep).any()
    assert not change.grown.any()
    assert places(keep & ~change.keep) == plain_lowest(weight, keep, pruned - (size - kept))


@settings(deadline=None)
@given(masked_matrices(), st.floats(0, 1), st.data())
def test_regrowth_keeps_the_number_of_weights(
    matrix: tuple[Tensor, Tensor], fraction: float, data: st.DataObject
) -> None:
    weight, keep = matrix
    kept, size = int(keep.sum()), keep.numel()
    gradient = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).view_as(weight)
    dropped = drop_count(size, kept, fraction)
    change = regrow(weight, keep, kept, dropped, gradient)
    lost = keep & ~change.survivors
    assert places(lost) == plain_lowest(weight, keep, dropped)
    assert int(change.keep.sum()) == kept
    assert not (change.grown & change.survivors).any()
    assert not (change.grown & keep & ~lost).any()
    candidates = ~change.survivors
    assert places(candidates & ~change.grown) == plain_lowest(
        gradient, candidates, int(candidates.sum()) - int(change.grown.sum())
    )


@settings(deadline=None)
@given(masked_matrices(), st.data())
def test_a_choice_among_all_weights_is_the_one_shot_mask(matrix: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    weight, keep = matrix
    pruned = data.draw(st.integers(0, keep.numel() - 1))
    change = select(weight, keep, pruned)
    assert torch.equal(change.keep, keep_highest(weight.abs(), pruned))
    assert torch.equal(change.grown, change.keep & ~keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_on_fixed_weights_end_at_the_one_shot_mask_and_are_those_of_torch(dtype: torch.dtype) -> None:
    """Whole numbers of weights at a time (torch.nn.utils.prune without ties), whatever the steps on the way."""
    weight = torch.randperm(600, generator=torch.Generator().manual_seed(0)).view(20, 30).float() + 1
    weight = (weight if dtype == torch.float32 else weight.to(torch.bfloat16).float()).to(dtype)
    layer = torch.nn.Linear(30, 20, bias=False, dtype=dtype)
    layer.weight.data.copy_(weight)
    keep, kept = torch.ones(20, 30, dtype=torch.bool), 600
    for sparsity in (0.1, 0.25, 0.5, 0.9):
        pruned = pruned_count(600, sparsity)
        prune.l1_unstructured(layer, "weight", pruned - (600 - kept))
        keep, kept = cut(weight * keep, keep, kept, pruned).keep, 600 - pruned
        assert torch.equal(keep, keep_highest(weight, pruned))
        if dtype == torch.float32:
            assert torch.equal(layer.weight_mask.bool(), keep)


def test_the_fraction_of_what_is_left_is_the_same_cut() -> None:
    """(s_k - s_{k-1}) / (1 - s_{k-1}) of the kept, as torch.nn.utils.prune has it, rounds to the same counts."""
    before, size = 0, 10_000
    for k in range(1, 11):
        after = pruned_count(size, 0.9 * k / 10)
        share = (after - before) / (size - before)
        assert before + round(share * (size - before)) == after
        before = after


@settings(deadline=None)
@given(st.lists(masked_matrices(), min_size=1, max_size=3), st.data())
def test_global_cuts_are_those_of_one_long_matrix(matrices: list[tuple[Tensor, Tensor]], data: st.DataObject) -> None:
    named = dict(zip("abc", matrices, strict=False))
    shapes = {name: tuple(keep.shape) for name, (_, keep) in named.items()}
    sizes = {name: keep.numel() for name, (_, keep) in named.items()}
    kept = {name: int(keep.sum()) for name, (_, keep) in named.items()}
    long, keeps = (torch.cat([pair[part].flatten() for pair in named.values()]) for part in (0, 1))
    pruned = data.draw(st.integers(int((~keeps).sum()), len(long) - 1))
    expected = cut(long, keeps, int(keeps.sum()), pruned).keep.split(list(sizes.values()))
    by_name = {name: int((~part).sum()) for name, part in zip(named, expected, strict=True)}

    def counts() -> dict[str, int]:
        return global_counts(shapes, kept, pruned / len(long), lambda name: named[name][0][named[name][1]])

    if any(by_name[name] == sizes[name] for name in named):
        with pytest.raises(InputError, match="no layer may be 100% sparse"):
            counts()
        return
    assert counts() == by_name
    for (weight, keep), part, name in zip(named.values(), expected, named, strict=True):
        assert torch.equal(cut(weight, keep, kept[name], by_name[name]).keep.flatten(), part)


def test_counts_are_those_of_one_shot() -> None:
    shapes = {"a": (2, 5), "b": (1, 7), "c": (40, 30)}
    sizes = {"a": 10, "b": 7, "c": 1200}
    assert counts_by_shape("uniform", shapes, 0.3) == {name: pruned_count(size, 0.3) for name, size in sizes.items()}
    assert counts_by_shape("erk", shapes, 0.9) == {name: lost for name, (lost,) in erk(shapes, [0.9]).items()}


@pytest.mark.parametrize(("size", "kept", "fraction", "expected"), [(10, 5, 0.3, 2), (10, 10, 0.3, 0), (10, 5, 0, 0)])
def test_a_whole_matrix_drops_nothing(size: int, kept: int, fraction: float, expected: int) -> None:
    assert drop_count(size, kept, fraction) == expected


def test_random_growth_depends_on_seed_step_and_matrix_alone() -> None:
    weight = torch.zeros(4, 5)
    first = random_growth(weight, 1, 10, "a")
    assert torch.equal(first, random_growth(weight + 1, 1, 10, "a"))
    assert not any(
        torch.equal(first, random_growth(weight, *key)) for key in ((2, 10, "a"), (1, 20, "a"), (1, 10, "b"))
    )
    assert 0 <= float(first.min()) <= float(first.max()) < 1


def test_every_masked_place_is_grown_equally_often() -> None:
    keep = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0]]).bool()
    grown = torch.zeros(1, 8)
    for step in range(900):
        grown += highest(random_growth(keep.float(), 0, step, "w"), ~keep, 2, 6)
    assert not grown[keep].any()
    assert (grown[~keep] - 300).abs().max() < 60  # a binomial of 900 and 1/3 has a deviation of 14
