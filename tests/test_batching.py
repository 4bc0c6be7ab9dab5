"""Packed examples are the examples: same tokens, same loss, no attention from example to example."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tune_sparse.data.batching import packed, padded
from tune_sparse.data.splits import Encoded
from tune_sparse.models.checkpoints import load_model
from tune_sparse.training.loop import answer_loss

EXAMPLES = [Encoded((1, 2, 3), (4,)), Encoded((5,), (6, 7)), Encoded((), (8, 9))]


def test_padding_by_hand() -> None:
    batch = padded(EXAMPLES, train_on_prompt=False)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0]]
    assert batch.positions is None
    assert padded(EXAMPLES, train_on_prompt=True).loss_mask.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]]


def test_packing_by_hand() -> None:
    batch = packed(EXAMPLES, False, 6)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 8, 9], [5, 6, 7, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=20), st.integers(18, 40))
def test_packing_loses_no_token_and_stays_within_its_length(lengths: list[tuple[int, int]], pack_to: int) -> None:
    examples = [Encoded(tuple(range(1, c + 1)), tuple(range(50, 50 + a))) for c, a in lengths]
    together, apart = packed(examples, False, pack_to), padded(examples, train_on_prompt=False)
    assert together.ids.shape[1] <= pack_to
    assert together.loss_mask.sum() == apart.loss_mask.sum()
    assert sorted(together.ids[together.loss_mask].tolist()) == sorted(apart.ids[apart.loss_mask].tolist())
    assert sorted(together.ids[together.ids > 0].tolist()) == sorted(apart.ids[apart.ids > 0].tolist())


@pytest.fixture(params=["llama", "mistral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(request.getfixturevalue(request.param), torch.float32, torch.device("cpu"))


def long_examples() -> list[Encoded]:
    """Examples longer than Mistral's window, too."""
    rng = random.Random(0)
    return [
        Encoded(tuple(rng.randrange(1, 500) for _ in range(rng.randint(3, 70))), (rng.randrange(1, 500), 7))
        for _ in range(9)
    ]


@pytest.mark.parametrize("train_on_prompt", [False, True])
@torch.no_grad()
def test_packing_does_not_change_the_loss(train_on_prompt: bool, model: PreTrainedModel) -> None:
    examples = long_examples()
    apart, count = answer_loss(model, examples, train_on_prompt)
    together, packed_count = answer_loss(model, examples, train_on_prompt, pack_to=200)
    assert packed_count == count
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_an_example_does_not_see_its_neighbour(model: PreTrainedModel) -> None:
    first, second, other = long_examples()[:3]
    behind_first = answer_loss(model, [first, second], pack_to=200)[0] - answer_loss(model, [first])[0]
    behind_other = answer_loss(model, [other, second], pack_to=200)[0] - answer_loss(model, [other])[0]
    torch.testing.assert_close(behind_first, behind_other, atol=1e-4, rtol=1e-4)


def test_packing_computes_fewer_tokens() -> None:
    examples = long_examples()
    assert packed(examples, False, 120).ids.numel() < 0.8 * padded(examples, train_on_prompt=False).ids.numel()
