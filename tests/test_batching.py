"""Packed examples are the examples: same tokens, same loss, no attention from example to example."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.data import batching
from tune_sparse.data.batching import (
    _cheapest_starts,
    batches_by_length,
    batches_with_little_padding,
    example_tokens,
    micro_batches,
)
from tune_sparse.data.splits import Encoded, encode_training, load_splits
from tune_sparse.data.tasks import TASKS
from tune_sparse.models.checkpoints import load_model, load_tokenizer
from tune_sparse.training.loop import answer_loss, batches

EXAMPLES = [Encoded((1, 2, 3), (4,)), Encoded((5,), (6, 7)), Encoded((), (8, 9))]


def test_padding_by_hand() -> None:
    [batch] = micro_batches(EXAMPLES, 12)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]]
    assert (batch.places.tolist(), batch.targets.tolist()) == ([2, 4, 5, 8], [4, 6, 7, 9])
    assert batch.predicts_target().int().tolist() == [[0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch.positions is None
    assert micro_batches(EXAMPLES, 12, train_on_prompt=True)[0].targets.tolist() == [2, 3, 4, 6, 7, 9]


def test_packing_by_hand() -> None:
    [batch] = micro_batches(EXAMPLES, 12, pack_to=6)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 8, 9], [5, 6, 7, 0, 0, 0]]
    assert (batch.places.tolist(), batch.targets.tolist()) == ([2, 4, 6, 7], [4, 9, 6, 7])
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]


def test_micro_batches_by_hand() -> None:
    assert [batch.ids.tolist() for batch in micro_batches(EXAMPLES, 6)] == [[[1, 2, 3, 4]], [[5, 6, 7], [8, 9, 0]]]
    assert [batch.ids.shape for batch in micro_batches(EXAMPLES, 1)] == [(1, 4), (1, 3), (1, 2)]
    assert [batch.ids.tolist() for batch in micro_batches(EXAMPLES, 4, pack_to=6)] == [
        [[1, 2, 3, 4]],
        [[5, 6, 7]],
        [[8, 9]],
    ]


LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=20)


@given(LENGTHS, st.integers(18, 60), st.sampled_from([None, 18, 40]))
def test_micro_batches_have_every_token_and_target_once_and_obey_the_budget(
    lengths: list[tuple[int, int]], tokens: int, pack_to: int | None
) -> None:
    examples = [
        Encoded(tuple(range(100 * i, 100 * i + c)), tuple(range(100 * i + 50, 100 * i + 50 + a)))
        for i, (c, a) in enumerate(lengths, start=1)
    ]
    batches = micro_batches(examples, tokens, pack_to=pack_to)
    assert all(batch.ids.numel() <= tokens for batch in batches)
    ids = [token for batch in batches for token in batch.ids.flatten().tolist() if token]
    assert sorted(ids) == sorted(token for e in examples for token in e.context + e.continuation)
    targets = [token for batch in batches for token in batch.targets.tolist()]
    assert sorted(targets) == sorted(
        token for e in examples for token in (e.context + e.continuation)[max(1, len(e.context)) :]
    )
    for batch in batches:
        before = batch.ids.flatten()[batch.places]
        assert ((batch.targets - before == 1) | (batch.targets % 100 == 50)).all(), "a target follows its place"


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
    [apart], [together] = (micro_batches(examples, 10_000, train_on_prompt, pack_to) for pack_to in (None, 200))
    assert len(apart.targets) == len(together.targets)
    torch.testing.assert_close(answer_loss(model, together), answer_loss(model, apart), atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_an_example_does_not_see_its_neighbour(model: PreTrainedModel) -> None:
    first, second, other = long_examples()[:3]

    def loss(*examples: Encoded) -> Tensor:
        [batch] = micro_batches(examples, 10_000, pack_to=200)
        return answer_loss(model, batch)

    behind_first, behind_other = loss(first, second) - loss(first), loss(other, second) - loss(other)
    torch.testing.assert_close(behind_first, behind_other, atol=1e-4, rtol=1e-4)


def test_packing_computes_fewer_tokens() -> None:
    examples = long_examples()
    [apart], [together] = (micro_batches(examples, 10_000, pack_to=pack_to) for pack_to in (None, 120))
    assert together.ids.numel() < 0.8 * apart.ids.numel()


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_batches_hold_every_row_once_and_obey_the_budget(sizes: list[int], tokens: int) -> None:
    batches = batches_by_length(sizes, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        assert batch
        assert len(batch) * max(sizes[i] for i in batch) <= tokens or len(batch) == 1
    in_order = [sizes[i] for batch in batches for i in batch]
    assert in_order == sorted(sizes, reverse=True)


def test_batches_by_hand() -> None:
    assert batches_by_length([3, 10, 4, 3, 20], 10) == [[4], [1], [2, 0], [3]]


def test_batches_with_little_padding_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together 10, 30 and 29 tokens have 21 of padding."""
    sizes = [10, 30, 29]
    assert batches_with_little_padding(sizes, 90) == [[1, 2, 0]], "a pass costs more"
    monkeypatch.setattr(batching, "PASS_TOKENS", (100, 5))
    assert batches_with_little_padding(sizes, 90) == [[1, 2], [0]]
    assert batches_with_little_padding([30, 30, 29], 90) == [[0, 1, 2]], "little padding is left alone"
    assert batches_with_little_padding([], 90) == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(50, 200), st.integers(0, 60))
def test_no_other_cuts_cost_less(sizes: list[int], tokens: int, pass_tokens: int) -> None:
    falling = sorted(sizes, reverse=True)

    def cost(starts: Sequence[int]) -> int:
        parts = [(end - start) * falling[start] for start, end in itertools.pairwise([*starts, len(falling)])]
        return sum(parts) + pass_tokens * len(parts) if max(parts) <= tokens else 10**9

    places = range(1, len(falling))
    others = ((0, *cuts) for n in range(len(falling)) for cuts in itertools.combinations(places, n))
    assert cost(_cheapest_starts(falling, tokens, pass_tokens)) == min(map(cost, others))


@pytest.mark.parametrize("task", ["boolq", "hellaswag", "gsm8k"])
def test_real_examples_are_padded_by_at_most_7_percent(task: str, llama: Path) -> None:
    """In steps of 256 examples with micro-batches of 8,192 tokens."""
    data = Path(__file__).parents[2] / "shared" / "data"
    if not (data / task / "train.jsonl").exists():
        pytest.skip("needs ../shared/data, whole training splits")
    protocol = Protocol(n_train=700)
    splits = load_splits(TASKS[task], data, protocol)
    examples = encode_training(load_tokenizer(llama), TASKS[task], splits.train, protocol.max_tokens, None)
    for batch in itertools.islice(batches(examples, protocol, seed=0), 2):
        padded = sum(part.ids.numel() for part in micro_batches(batch, 8192))
        assert padded <= 1.07 * sum(map(example_tokens, batch))
