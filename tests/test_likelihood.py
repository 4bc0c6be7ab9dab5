from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import counted, random_tokens, tokens_read
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tune_sparse.data.splits import Encoded
from tune_sparse.evaluation import likelihood
from tune_sparse.evaluation.likelihood import (
    PADDING,
    WORTHWHILE,
    SharedPrefixBatch,
    branch_mask,
    log_likelihoods,
    pack_choices,
    question_tokens,
)
from tune_sparse.models.checkpoints import load_model

CPU = torch.device("cpu")
TOLERANCE = 1e-4
"""Between orders of summation in fp32, summed over a continuation: the bound of the issue."""


SHARED = random_tokens(50, 0)
"""A context longer than Mistral's window of 32."""

QUESTIONS: dict[str, list[Encoded]] = {
    "endings of several tokens": [Encoded(SHARED, random_tokens(n, n)) for n in (1, 2, 3, 5)],
    "endings of one token": [Encoded(SHARED, (token,)) for token in (7, 8, 9, 10)],
    "endings longer than the window": [Encoded(SHARED, random_tokens(n, n)) for n in (33, 40, 45)],
    "a context of one token": [Encoded((3,), random_tokens(n, n)) for n in (1, 2, 9)],
    "options within the context": [Encoded((*SHARED, option), (11, 12, 13)) for option in (3, 4)],
    "contexts of different lengths": [Encoded(SHARED[:40], (*SHARED[40:], 5)), Encoded(SHARED, (6,))],
    "nothing in common": [Encoded(random_tokens(n, n), random_tokens(3, -n)) for n in (1, 20, 31, 32, 33, 70)],
    "different starts lost": [Encoded(SHARED[n:], random_tokens(n, n)) for n in (1, 2, 3)],
    "an ending twice": [Encoded(SHARED, ending) for ending in ((5, 6), (5, 7), (5, 6), (5, 6))],
    "an ending within another": [Encoded(SHARED, (5, 6, 7)[:n]) for n in (1, 2, 3)],
    "one choice": [Encoded(SHARED, (5, 6, 7))],
    "sixty choices": [Encoded(SHARED, random_tokens(1 + n % 4, n)) for n in range(60)],
}


@torch.no_grad()
def plain(model: PreTrainedModel, choice: Encoded) -> float:
    """From the full logits of the choice alone."""
    text = choice.context + choice.continuation
    log_probabilities = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[i - 1, text[i]].item() for i in range(len(choice.context), len(text)))


@pytest.mark.parametrize("kind", QUESTIONS)
def test_log_likelihoods_are_those_of_the_full_logits(kind: str, model: PreTrainedModel) -> None:
    choices = QUESTIONS[kind]
    expected = [plain(model, choice) for choice in choices]
    assert log_likelihoods(model, [choices], 8192) == [pytest.approx(expected, abs=TOLERANCE)]


@pytest.mark.parametrize("batch_tokens", [2, 150, 400, 100_000])
def test_log_likelihoods_do_not_depend_on_the_batches(batch_tokens: int, model: PreTrainedModel) -> None:
    """Trees and plain rows, long and short, share passes or have one each; the questions keep their order."""
    expected = [[plain(model, choice) for choice in choices] for choices in QUESTIONS.values()]
    found = log_likelihoods(model, list(QUESTIONS.values()), batch_tokens)
    assert found == [pytest.approx(values, abs=TOLERANCE) for values in expected]


def test_the_same_call_gives_the_same_bits(model: PreTrainedModel) -> None:
    first, again = (log_likelihoods(model, list(QUESTIONS.values()), 400) for _ in range(2))
    assert first == again


def test_no_questions_have_no_log_likelihoods(model: PreTrainedModel) -> None:
    assert log_likelihoods(model, [], 8192) == []


def test_endings_of_one_token_are_read_off_one_row_of_the_context(model: PreTrainedModel) -> None:
    with counted(model.model, tokens_read) as tokens, counted(model.lm_head, len) as logits:
        log_likelihoods(model, [QUESTIONS["endings of one token"]], 8192)
    assert (tokens, logits) == ([len(SHARED)], [1])


def test_the_context_is_read_once_and_logits_only_where_an_ending_is_read(model: PreTrainedModel) -> None:
    with counted(model.model, tokens_read) as tokens, counted(model.lm_head, len) as logits:
        log_likelihoods(model, [QUESTIONS["endings of several tokens"]], 8192)
    endings_without_their_last = 0 + 1 + 2 + 4
    assert tokens == [len(SHARED) + endings_without_their_last]
    assert logits == [1 + endings_without_their_last]


@pytest.mark.parametrize("batch_tokens", [256, 1024])
@pytest.mark.parametrize("times", [1, 10])
def test_a_pass_reads_no_more_than_its_tokens_however_many_rows_and_choices(
    times: int, batch_tokens: int, model: PreTrainedModel
) -> None:
    many_choices = [Encoded(SHARED, random_tokens(1 + n % 6, n)) for n in range(40 * times)]
    rows = [[Encoded(random_tokens(n, n), random_tokens(3, -n))] for n in range(20, 70)] * times
    with counted(model.model, tokens_read) as tokens:
        log_likelihoods(model, [many_choices, *rows], batch_tokens)
    assert batch_tokens / 2 < max(tokens) <= batch_tokens


def test_logits_are_computed_in_pieces_of_bounded_size(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = list(QUESTIONS.values())
    expected = log_likelihoods(model, questions, 8192)
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 3 * 4 * model.config.vocab_size)
    with counted(model.lm_head, len) as rows:
        found = log_likelihoods(model, questions, 8192)
    assert max(rows) == 3
    assert found == [pytest.approx(values, abs=TOLERANCE) for values in expected]


def test_bf16_is_summed_in_fp32(model: PreTrainedModel) -> None:
    low = load_model(Path(model.name_or_path), torch.bfloat16, CPU)
    found = log_likelihoods(low, list(QUESTIONS.values()), 8192)
    exact = log_likelihoods(model, list(QUESTIONS.values()), 8192)
    assert found == [pytest.approx(values, rel=0.02) for values in exact]


# Trees, without a model.

CHOICES = st.builds(
    lambda context, continuation: Encoded(tuple(context), tuple(continuation)),
    st.lists(st.integers(1, 2), min_size=1, max_size=6),
    st.lists(st.integers(1, 2), min_size=1, max_size=4),
)


@st.composite
def questions(draw: st.DrawFn) -> list[Encoded]:
    """Choices of two tokens in all, so that contexts, prefixes and whole endings often agree."""
    prefix = tuple(draw(st.lists(st.integers(1, 2), max_size=12)))
    choices = draw(st.lists(CHOICES, min_size=1, max_size=6))
    return [Encoded(prefix + choice.context, choice.continuation) for choice in choices]


def seen_from(packed: SharedPrefixBatch, at: int) -> list[tuple[int, int]]:
    """(position, token) of what the token at `at` sees."""
    [mask] = branch_mask(torch.tensor([packed.positions]), torch.tensor([packed.branches]), None)
    return sorted((packed.positions[k], packed.tokens[k]) for k in mask[at].nonzero().flatten().tolist())


@settings(deadline=None, max_examples=150)
@given(questions(), st.integers(0, 40))
def test_every_choice_of_a_tree_is_read_as_if_it_stood_alone(choices: list[Encoded], limit: int) -> None:
    batches = pack_choices(choices, limit)
    read = [(packed, targets) for packed in batches for targets in packed.targets]
    assert len(read) == len(choices)
    for choice, (packed, targets) in zip(choices, read, strict=True):
        whole = choice.context + choice.continuation
        assert len(targets) == len(choice.continuation)
        for read_before, (at, token) in enumerate(targets, start=len(choice.context)):
            assert seen_from(packed, at) == list(enumerate(whole[:read_before]))
            assert token == whole[read_before]


@settings(deadline=None)
@given(questions(), st.integers(0, 40))
def test_trees_obey_their_limit_and_never_read_more_than_the_choices_have(choices: list[Encoded], limit: int) -> None:
    batches = pack_choices(choices, limit)
    own = sum(len(choice.context + choice.continuation) - 1 for choice in choices)
    assert sum(len(packed.tokens) for packed in batches) <= own
    assert all(len(packed.tokens) <= limit or len(packed.targets) == 1 for packed in batches)
    unlimited = pack_choices(choices, 1000)
    assert len(unlimited) in (1, len(choices))
    assert question_tokens(choices) == sum(len(packed.tokens) for packed in unlimited)
    if len(unlimited) == 1 < len(choices):
        assert question_tokens(choices) <= WORTHWHILE * own


def test_a_tree_by_hand() -> None:
    [packed] = pack_choices([Encoded((1, 2, 3), (4, 5, 6)), Encoded((1, 2, 3), (4, 8)), Encoded((1, 2, 3), (7,))], 100)
    assert packed.tokens == (1, 2, 3, 4, 5, 4)
    assert packed.positions == (0, 1, 2, 3, 4, 3)
    assert packed.branches == (0, 0, 0, 1, 1, 2)
    assert packed.targets == (((2, 4), (3, 5), (4, 6)), ((2, 4), (5, 8)), ((2, 7),))


def test_choices_that_share_little_are_rows_of_their_own() -> None:
    choices = [Encoded((1, 2), (3, 4, 5, 6, 7)), Encoded((1, 8), (3, 4, 5, 6, 7))]
    batches = pack_choices(choices, 100)
    assert [packed.tokens for packed in batches] == [(1, 2, 3, 4, 5, 6), (1, 8, 3, 4, 5, 6)]
    assert not any(packed.is_branched for packed in batches)


def test_a_question_of_many_choices_is_divided_at_the_limit() -> None:
    batches = pack_choices([Encoded((1, 2, 3, 4), (n, n)) for n in range(5, 10)], 6)
    assert [packed.tokens for packed in batches] == [(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 7, 8), (1, 2, 3, 4, 9)]


NO, YES = False, True


def test_a_mask_by_hand() -> None:
    """Two shared tokens, a branch of two, a branch of one, and padding."""
    positions = torch.tensor([[0, 1, 2, 3, 2, 0]])
    branches = torch.tensor([[0, 0, 1, 1, 2, PADDING]])
    assert branch_mask(positions, branches, None)[0].tolist() == [
        [YES, NO, NO, NO, NO, NO],
        [YES, YES, NO, NO, NO, NO],
        [YES, YES, YES, NO, NO, NO],
        [YES, YES, YES, YES, NO, NO],
        [YES, YES, NO, NO, YES, NO],
        [YES, NO, NO, NO, NO, YES],
    ]


def test_a_mask_with_a_window_of_two_by_hand() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 2, 0]])
    branches = torch.tensor([[0, 0, 1, 1, 2, PADDING]])
    assert branch_mask(positions, branches, 2)[0].tolist() == [
        [YES, NO, NO, NO, NO, NO],
        [YES, YES, NO, NO, NO, NO],
        [NO, YES, YES, NO, NO, NO],
        [NO, NO, YES, YES, NO, NO],
        [NO, YES, NO, NO, YES, NO],
        [YES, NO, NO, NO, NO, YES],
    ]
