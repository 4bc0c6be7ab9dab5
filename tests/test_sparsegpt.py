from __future__ import annotations

import pytest
import torch
from bench_masks import plain_sparsegpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tune_sparse.pruning.masks import pruned_count
from tune_sparse.pruning.sparsegpt import BLOCK, DAMPING, inverse_factor, sparsegpt


def problem(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (O, I) and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    strong = torch.randn(4 * width, 3, generator=generator) @ torch.randn(3, width, generator=generator)
    x = torch.randn(4 * width, width, generator=generator) + strong
    return weight, 2 * x.T @ x / len(x)


def error(pruned: Tensor, weight: Tensor, hessian: Tensor) -> float:
    return float((((pruned - weight) @ hessian) * (pruned - weight)).sum())


def test_the_factor_is_the_published_one() -> None:
    _, hessian = problem(1, 40)
    before = hessian.clone()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(40)
    published = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    torch.testing.assert_close(inverse_factor(hessian), published, atol=1e-5, rtol=1e-4)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.9])
def test_what_reads_dead_inputs_goes_first_as_in_the_authors_code(sparsity: float) -> None:
    """`SparseGPT.fasterprune` of IST-DASLab/sparsegpt: H[dead, dead] = 1, W[:, dead] = 0, then damping and the loop."""
    weight, hessian = problem(24, 2 * BLOCK + 17)
    dead = torch.arange(len(hessian)) % 17 == 0
    hessian[dead], hessian[:, dead] = 0, 0
    filled, zeroed = hessian.clone(), weight.clone()
    filled[dead, dead], zeroed[:, dead] = 1, 0
    filled += DAMPING * filled.diagonal().mean() * torch.eye(len(filled))
    published = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(filled)), upper=True)
    count = pruned_count(weight.numel(), sparsity)
    expected, expected_keep = plain_sparsegpt(zeroed, published, count)
    pruned, keep = sparsegpt(weight, inverse_factor(hessian), count, dead=dead)
    assert (keep == expected_keep).float().mean() > 0.9999
    torch.testing.assert_close(pruned, expected, atol=1e-3, rtol=1e-2)
    assert not pruned[:, dead].any()
    without, _ = sparsegpt(weight, inverse_factor(hessian), count)
    assert error(pruned, weight, hessian) < error(without, weight, hessian)


@pytest.mark.parametrize(("rows", "width"), [(7, 5), (24, BLOCK), (16, 3 * BLOCK), (9, BLOCK + 37)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_masks_and_weights_are_those_of_the_papers_loop(rows: int, width: int, sparsity: float) -> None:
    weight, hessian = problem(rows, width)
    factor, count = inverse_factor(hessian), pruned_count(weight.numel(), sparsity)
    pruned, keep = sparsegpt(weight, factor, count)
    expected, expected_keep = plain_sparsegpt(weight, factor, count)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(pruned, expected, atol=1e-4, rtol=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.99), st.booleans())
def test_counts_are_exact_and_zeros_are_zeros(rows: int, width: int, sparsity: float, transposed: bool) -> None:
    weight, hessian = problem(rows, width)
    count = pruned_count(weight.numel(), sparsity)
    pruned, keep = sparsegpt(weight, inverse_factor(hessian), count, transposed=transposed)
    assert int((~keep).sum()) == count
    assert not pruned[~keep].any()


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8)])
def test_groups_keep_as_many_as_they_may(kept: int, group: int) -> None:
    weight, hessian = problem(10, BLOCK + 24)
    pruned, keep = sparsegpt(weight, inverse_factor(hessian), 0, (kept, group))
    assert (keep.reshape(-1, group).sum(dim=1) == kept).all()
    assert not pruned[~keep].any()


def test_two_columns_by_hand() -> None:
    """Inputs that are equal: what the removed weight did, the other one takes over."""
    weight, hessian = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    pruned, keep = sparsegpt(weight, inverse_factor(hessian), 1)
    assert keep.tolist() == [[False, True]]
    torch.testing.assert_close(pruned, torch.tensor([[0.0, 3.0]]), atol=0.02, rtol=0)


def test_it_loses_less_than_the_mask_alone() -> None:
    weight, hessian = problem(32, 64)
    pruned, keep = sparsegpt(weight, inverse_factor(hessian), weight.numel() // 2)
    assert error(pruned, weight, hessian) < 0.7 * error(weight * keep, weight, hessian)


def explicit_obs(weight: Tensor, hessian: Tensor, count: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(pruned weight, keep-mask) by the optimal brain surgeon with explicit inverses in float64: column after column,
    each weight that goes is made up for by those to its right (Frantar & Alistarh 2023, eq. 3)."""
    w, keep = weight.double(), kept.clone()
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    inverses = [torch.linalg.inv(damped[i:, i:]) for i in range(len(damped))]
    errors = torch.stack([w[:, i] ** 2 / inverse[0, 0] for i, inverse in enumerate(inverses)], dim=1)
    errors[~kept] = -1
    keep.view(-1)[errors.flatten().argsort(stable=True)[:count]] = False
    for i, inverse in enumerate(inverses):
        w[:, i:] -= torch.outer(w[:, i] * ~keep[:, i], inverse[0] / inverse[0, 0])
    return w * keep, keep


@pytest.mark.parametrize("already", [0, 13])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_optimal_brain_surgeon_on_8_by_8(seed: int, already: int) -> None:
    weight, hessian = problem(8, 8, seed)
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept.view(-1)[torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:already]] = False
    found, keep = sparsegpt(weight * kept, inverse_factor(hessian), 32, kept=kept if already else None)
    expected, expected_keep = explicit_obs(weight * kept, hessian, 32, kept)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 300), st.floats(0, 0.9), st.floats(0, 0.99), st.booleans())
def test_a_mask_only_loses_weights_and_counts_stay_exact(
    rows: int, width: int, low: float, high: float, transposed: bool
) -> None:
    weight, hessian = problem(rows, width)
    first, second = (pruned_count(weight.numel(), sparsity) for sparsity in sorted((low, high)))
    factor = inverse_factor(hessian)
    pruned, kept = sparsegpt(weight, factor, first, transposed=transposed)
    pruned[:, ::3] = 0  # kept weights that happen to be 0
    again, keep = sparsegpt(pruned, factor, second, transposed=transposed, kept=kept)
    assert not (keep & ~kept).any()
    assert int((~keep).sum()) == second
    assert not again[~keep].any()
