"""The chunked cross-entropy is torch's, with its gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_sparse.training import cross_entropy
from tune_sparse.training.cross_entropy import summed_cross_entropy

T, H, V = 23, 8, 50


def head(bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(H, V, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100])
def test_loss_and_gradient_are_those_of_torch(
    chunk_tokens: int, bias: bool, hidden: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk_tokens * V)
    loss = summed_cross_entropy(hidden, head(bias), targets)
    expected = F.cross_entropy(head(bias)(hidden), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value / 7, hidden)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_in_bfloat16_the_loss_is_summed_in_float32(hidden: Tensor, targets: Tensor) -> None:
    half = hidden.detach().bfloat16().requires_grad_()
    loss = summed_cross_entropy(half, head(False, torch.bfloat16), targets)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(head(False, torch.bfloat16)(half).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, half)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_a_head_in_training_gets_its_gradient(hidden: Tensor, targets: Tensor) -> None:
    layer = head(True).requires_grad_(True)
    summed_cross_entropy(hidden, layer, targets).backward()
    assert layer.weight.grad is not None
    assert hidden.grad is not None


def test_only_the_gradient_of_hidden_is_kept(hidden: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 4 * V)
    layer, largest, kept = head(False), [0], list[Tensor]()
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda z, dim: largest.append(z.numel()) or softmax(z, dim))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summed_cross_entropy(hidden, layer, targets)
    assert max(largest) == 4 * V
    assert [tuple(tensor.shape) for tensor in kept] == [(T, H)]


def test_without_gradients_none_is_computed(hidden: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "softmax", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        loss = summed_cross_entropy(hidden.detach(), head(False), targets)
    torch.testing.assert_close(loss, F.cross_entropy(head(False)(hidden.detach()), targets, reduction="sum"))
