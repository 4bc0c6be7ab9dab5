"""Every way to compute with a masked weight is the formula, in its outputs and in its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tune_sparse.errors import InputError
from tune_sparse.lora import masked_linear
from tune_sparse.lora.masked_linear import (
    EffectiveWeight,
    LoraImpl,
    Plain,
    Workspace,
    choose_impl,
    effective_weight,
    keep_for_steps,
)

O, I, R, T = 11, 7, 3, 5  # noqa: E741
ROWS, COLUMNS = torch.arange(O) % 3 != 1, torch.arange(I) % 4 != 2


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scattered(rows: int = O, columns: int = I) -> Tensor:
    return draw(9, rows, columns) > 0


MASKS: dict[str, Tensor] = {
    "elementwise": scattered(),
    "rows": ROWS[:, None].expand(O, I).contiguous(),
    "columns": COLUMNS.expand(O, I).contiguous(),
    "rows and columns": ROWS[:, None] & COLUMNS,
    "everything kept": torch.ones(O, I, dtype=torch.bool),
    "one weight": torch.zeros(O, I, dtype=torch.bool).index_put((torch.tensor(4), torch.tensor(2)), torch.tensor(True)),
}
CASES = [("plain", "everything kept"), *(("effective-weight", mask) for mask in MASKS)]


def pruned(mask: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A weight with a kept weight that is exactly zero, wherever two are kept."""
    weight = draw(1, *mask.shape, dtype=dtype) * mask
    kept = mask.flatten().nonzero().flatten()
    if len(kept) > 1:
        weight.view(-1)[kept[1]] = 0
    return weight


def make(impl: str, mask: Tensor, dtype: torch.dtype = torch.float64) -> tuple[LoraImpl, Tensor]:
    weight = pruned(mask, dtype)
    return (Plain() if impl == "plain" else choose_impl(weight, mask, R, Workspace(), impl)), weight


@pytest.fixture(autouse=True)
def chunks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_linear, "CHUNK_BYTES", 3 * I * 8)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("impl", "mask"), CASES)
def test_gradients_are_those_of_the_formula_in_float64(impl: str, mask: str, bias: bool) -> None:
    module, weight = make(impl, MASKS[mask])
    b = draw(5, O) if bias else None
    x, A, B = draw(2, 2, T, I), draw(3, R, I), draw(4, O, R)
    inputs = tuple(t.requires_grad_() for t in (x, A, B))

    def formula(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(x, weight + 0.5 * (B @ A) * MASKS[mask], b)

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return module(x, weight, b, A, B, 0.5)

    torch.testing.assert_close(layer(*inputs), formula(*inputs))
    assert torch.autograd.gradcheck(layer, inputs)
    dY = draw(6, 2, T, O)
    expected = torch.autograd.grad(formula(*inputs), inputs, dY)
    torch.testing.assert_close(torch.autograd.grad(layer(*inputs), inputs, dY), expected)


@pytest.mark.parametrize(("impl", "mask"), CASES)
def test_a_frozen_input_gets_no_gradient_and_the_adapters_the_same(impl: str, mask: str) -> None:
    module, weight = make(impl, MASKS[mask])
    A, B, dY = draw(3, R, I).requires_grad_(), draw(4, O, R).requires_grad_(), draw(6, T, O)
    x = draw(2, T, I)
    expected = torch.autograd.grad(F.linear(x, weight + 2 * (B @ A) * MASKS[mask]), (A, B), dY)
    torch.testing.assert_close(torch.autograd.grad(module(x, weight, None, A, B, 2.0), (A, B), dY), expected)


@pytest.mark.parametrize(("impl", "mask"), CASES)
def test_an_impl_gives_back_its_mask(impl: str, mask: str) -> None:
    module, weight = make(impl, MASKS[mask])
    found = module.mask(weight)
    if impl == "plain":
        assert found is None
    else:
        assert torch.equal(found, MASKS[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
def test_the_effective_weight_computes_with_the_merged_weight_to_the_last_bit(mask: str, dtype: torch.dtype) -> None:
    module, weight = make("effective-weight", MASKS[mask], dtype)
    x, A, B = draw(2, T, I, dtype=dtype), draw(3, R, I).float(), draw(4, O, R).float()
    merged = effective_weight(weight, A, B, 0.5, MASKS[mask])
    assert torch.equal(module(x, weight, None, A, B, 0.5), F.linear(x, merged))
    assert not merged[~MASKS[mask]].any()


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.floats(0.01, 100),
)
def test_the_effective_weight_keeps_zeros_and_is_the_formula(
    dtype: torch.dtype, rows: int, columns: int, seed: int, scaling: float
) -> None:
    mask = draw(seed, rows, columns) > 0
    weight = draw(seed + 1, rows, columns, dtype=dtype) * mask
    A, B = (draw(seed + i, *shape).bfloat16().float() for i, shape in ((2, (R, columns)), (3, (rows, R))))
    merged = effective_weight(weight, A, B, scaling, mask)
    assert merged.dtype == dtype
    assert not merged[~mask].any()
    sB = (scaling * B).to(dtype).double()
    torch.testing.assert_close(merged.double(), weight.double() + (sB @ A.double()) * mask, rtol=1e-2, atol=1e-2)


def test_effective_weight_by_hand() -> None:
    W, A, B = torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [2.0]])
    assert effective_weight(W, A, B, 0.5).tolist() == [[1.5, -0.5], [1.0, 3.0]]
    mask = torch.tensor([[True, False], [False, True]])
    assert effective_weight(W, A, B, 0.5, mask).tolist() == [[1.5, 0.0], [0.0, 3.0]]
    kept_zero = torch.tensor([[True, True], [False, True]])
    assert effective_weight(W, A, B, 0.5, kept_zero).tolist() == [[1.5, -0.5], [0.0, 3.0]]


def test_the_product_and_the_sum_are_not_rounded_in_between() -> None:
    W = torch.ones(1, 1, dtype=torch.bfloat16)
    half_and_a_little = torch.tensor([[2**-8, 2**-18]])
    assert effective_weight(W, torch.ones(2, 1), half_and_a_little, 1.0).item() == 1 + 2**-7


def test_a_layer_saves_its_input_and_nothing_of_the_size_of_the_weight() -> None:
    mask = scattered(64, 32)
    module, weight = make("effective-weight", mask, torch.float32)
    x = draw(2, T, 32, dtype=torch.float32).requires_grad_()
    A, B = draw(3, R, 32).float().requires_grad_(), draw(4, 64, R).float().requires_grad_()
    known = {t.data_ptr() for t in (x, weight, A, B)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x, weight, None, A, B, 1.0)
    assert saved
    assert all(t.data_ptr() in known for t in saved)


def test_one_workspace_serves_matrices_of_every_size_and_dtype() -> None:
    workspace = Workspace()
    small, large = torch.empty(2, 3), torch.empty(4, 3)
    first = workspace.get("weight", small)
    assert first.shape == (2, 3)
    assert workspace.get("weight", small).data_ptr() == first.data_ptr()
    grown = workspace.get("weight", large)
    assert grown.shape == (4, 3)
    assert workspace.get("weight", small).data_ptr() == grown.data_ptr()
    assert workspace.get("mask", small).data_ptr() != grown.data_ptr()
    assert workspace.get("weight", small, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("has_instructions", [False, True])
def test_a_bfloat16_product_is_rounded_once_whatever_the_cpu(
    has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_linear, "_multiplies_bfloat16", lambda: has_instructions)
    a, b = draw(1, 5, 7, dtype=torch.bfloat16), draw(2, 7, 3, dtype=torch.bfloat16)
    product = Workspace().product_into(torch.empty(5, 3, dtype=torch.bfloat16), a, b)
    torch.testing.assert_close(product, (a.double() @ b.double()).bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("has_instructions", [False, True])
def test_bfloat16_gradients_are_near_those_of_float64(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_linear, "_multiplies_bfloat16", lambda: has_instructions)
    mask = scattered(64, 48)
    weight = pruned(mask, torch.bfloat16)
    impl = choose_impl(weight, mask, R, Workspace(), "effective-weight")
    x, A, B, dY = draw(2, T, 48).bfloat16(), draw(3, R, 48).bfloat16(), draw(4, 64, R).bfloat16(), draw(6, T, 64)
    x, A, B = x.requires_grad_(), A.float().requires_grad_(), B.float().requires_grad_()
    found = torch.autograd.grad(impl(x, weight, None, A, B, 0.5), (x, A, B), dY.bfloat16())
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32, torch.float32]
    exact = tuple(t.detach().double().requires_grad_() for t in (x, A, B))
    formula = F.linear(exact[0], weight.double() + 0.5 * (exact[2] @ exact[1]) * mask)
    for ours, theirs in zip(found, torch.autograd.grad(formula, exact, dY), strict=True):
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


def test_layers_that_share_a_workspace_do_not_disturb_each_other() -> None:
    workspace = Workspace()
    masks = [scattered(6, 6), scattered(9, 6), scattered(4, 9)]
    weights = [pruned(mask) for mask in masks]
    impls = [choose_impl(w, m, 2, workspace, "effective-weight") for w, m in zip(weights, masks, strict=True)]
    factors = [(draw(i, 2, w.shape[1]), draw(i + 5, len(w), 2)) for i, w in enumerate(weights)]
    leaves = [f.requires_grad_() for pair in factors for f in pair]

    def network(layer: Callable[..., Tensor]) -> Tensor:
        x = draw(8, T, 6)
        for parts in zip(impls, weights, masks, factors, strict=True):
            x = layer(x, *parts).tanh()
        return x.sum()

    ours = network(lambda x, impl, W, M, f: impl(x, W, None, *f, 0.5))
    formula = network(lambda x, impl, W, M, f: F.linear(x, W + 0.5 * (f[1] @ f[0]) * M))
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(formula, leaves))


BIG = 2**9 + 1
WIDE = 20 * R
"""From this width on a square matrix is cheaper by its factors than by their product."""


@pytest.mark.parametrize(
    ("mask", "dtype", "expected"),
    [
        (torch.ones(WIDE, WIDE, dtype=torch.bool), torch.float32, "plain"),
        (torch.ones(WIDE, WIDE - 1, dtype=torch.bool), torch.float32, "effective-weight"),
        ((torch.arange(WIDE) < WIDE - 1)[:, None].expand(WIDE, WIDE), torch.float32, "effective-weight"),
        (MASKS["elementwise"], torch.float32, "effective-weight"),
        (MASKS["elementwise"], torch.bfloat16, "effective-weight"),
        (torch.rand(BIG, BIG) > 0.9, torch.float32, "effective-weight"),
        (torch.rand(BIG, BIG) > 0.9, torch.bfloat16, "effective-weight"),
    ],
)
def test_the_impl_follows_from_mask_rank_and_precision(mask: Tensor, dtype: torch.dtype, expected: str) -> None:
    weight = torch.randn(mask.shape).to(dtype) * mask
    assert choose_impl(weight, mask, R, Workspace()).name == expected


@pytest.mark.parametrize("requested", ["auto", "effective-weight"])
@pytest.mark.parametrize(("width", "expected"), [(WIDE, "plain"), (WIDE - 1, "effective-weight")])
def test_without_a_mask_the_cheaper_impl_computes_everything(requested: str, width: int, expected: str) -> None:
    weight = draw(1, width, width)
    impl = choose_impl(weight, None, R, Workspace(), requested)
    assert (impl.name, impl.mask(weight)) == (expected, None)
    x, A, B = draw(2, 1, width), draw(3, R, width).requires_grad_(), draw(4, width, R).requires_grad_()
    torch.testing.assert_close(impl(x, weight, None, A, B, 0.5), F.linear(x, weight + 0.5 * B @ A))
    assert torch.autograd.gradcheck(lambda A, B: impl(x, weight, None, A, B, 0.5), (A, B))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"mask": torch.ones(O, I + 1, dtype=torch.bool)},
        r"shape of its weight, \(11, 7\), got bool \(11, 8\)\. Give the",
    ),
    ({"mask": torch.ones(O, I)}, r"a mask must be bool .*, got float32 \(11, 7\)\."),
    ({"mask": MASKS["rows"]}, r"is 0 where its mask is, got 28 other values there\. Give the pruned weight"),
]


@pytest.mark.parametrize(("mistake", "message"), REFUSED, ids=lambda case: str(case)[:40])
def test_what_cannot_be_computed_is_refused(mistake: dict[str, Any], message: str) -> None:
    mask = mistake.get("mask", scattered())
    weight = torch.ones(O, I)
    weight *= scattered() if mask.shape == scattered().shape and mask is not MASKS["rows"] else 1
    with pytest.raises(InputError, match=message):
        choose_impl(weight, mask, R, Workspace())


def test_what_an_impl_keeps_moves_with_the_model_and_is_not_saved() -> None:
    module, _ = make("effective-weight", MASKS["elementwise"])
    moved = module.to("meta")
    assert all(buffer.is_meta for buffer in moved.buffers())
    assert list(module.buffers())
    assert module.state_dict() == {}
    assert list(module.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_effective_weight_trains_to_the_same_bits_and_is_built_once_a_step(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[int] = []
    build = EffectiveWeight.build
    monkeypatch.setattr(EffectiveWeight, "build", lambda self, *rest: builds.append(1) or build(self, *rest))
    found = []
    for is_kept in (False, True):
        impl, weight = make("effective-weight", MASKS["elementwise"], dtype)
        A, B = nn.Parameter(draw(3, R, I).float()), nn.Parameter(draw(4, O, R).float())
        optimizer = torch.optim.SGD([A, B], lr=0.1)
        if is_kept:
            keep_for_steps(nn.ModuleList([impl]), optimizer)
        for step in range(2):
            for part in range(3):
                x = draw(10 * step + part, T, I, dtype=dtype).requires_grad_()
                impl(x, weight, None, A, B, 0.5).float().square().sum().backward()
            found += [x.grad, A.grad.clone(), B.grad.clone()]
            optimizer.step()
            assert impl.of_step is None
            with torch.no_grad():
                found.append(impl(x, weight, None, A, B, 0.5))
            assert impl.of_step is None, "only training keeps it"
            optimizer.zero_grad()
    half = len(found) // 2
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))
    assert len(builds) == 2 * (6 + 1) + 2 * (1 + 1)
