"""Layers that compute with W⊙M and train W: outputs and gradients are those of autograd where W⊙M is a leaf."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tune_sparse.models.architectures import Matrix
from tune_sparse.pruning.straight_through import StraightThrough


@pytest.mark.parametrize(("transposed", "bias"), [(False, False), (False, True), (True, True)])
def test_the_gradient_of_an_effective_weight_goes_to_the_dense_one(transposed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Conv1D(4, 6) if transposed else nn.Linear(6, 4, bias=bias)
    model = nn.ModuleDict({"w": layer})
    keep = torch.rand(layer.weight.shape) > 0.5
    x, pull = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 4)
    leaf = (layer.weight * keep).detach().requires_grad_(True)
    expected = x @ leaf if transposed else x @ leaf.T
    expected = expected + layer.bias if bias else expected
    gradients = torch.autograd.grad((expected * pull).sum(), [x, leaf])

    masked = StraightThrough(model, Matrix("w.weight", 0, "w", None, "up", transposed), {"w.weight": keep})
    y = layer(x)
    ours = torch.autograd.grad((y * pull).sum(), [x, layer.weight, *([layer.bias] if bias else [])])
    for one, other in zip((y, *ours), (expected, *gradients), strict=False):
        torch.testing.assert_close(one, other)
    assert (ours[1][~keep] != 0).all()
    masked.end()
    assert not torch.equal(layer(x), y)


def test_under_autocast_it_computes_in_the_lower_precision() -> None:
    layer = nn.Linear(6, 4, bias=False)
    StraightThrough(
        nn.ModuleDict({"w": layer}),
        Matrix("w.weight", 0, "w", None, "up", False),
        {"w.weight": torch.ones(4, 6).bool()},
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 6))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
