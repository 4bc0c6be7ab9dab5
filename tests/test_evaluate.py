from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tune_sparse import evaluate
from tune_sparse.config import Protocol
from tune_sparse.data import Encoded
from tune_sparse.embedded import embedded_rows
from tune_sparse.errors import RunError
from tune_sparse.evaluate import Outcome, Scored, TestSet, encode_test, generate, log_likelihoods, score
from tune_sparse.models import load_model, load_tokenizer
from tune_sparse.tasks import TASKS

PROTOCOL = Protocol(max_tokens=256, max_new_tokens=8, precision="float32")


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_model(folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def random_tokens(count: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1, 500) for _ in range(count))


def random_pairs() -> list[Encoded]:
    """Answers of one and of several tokens, contexts on both sides of Mistral's window of 32."""
    several = [Encoded(random_tokens(n, n), random_tokens(1 + n % 4, -n)) for n in (1, 3, 20, 31, 32, 33, 70, 120)]
    shared = random_tokens(50, 0)
    return [*several, *(Encoded(shared, (token,)) for token in (7, 8, 9, 10))]


@torch.no_grad()
def plain_log_likelihood(model: PreTrainedModel, pair: Encoded) -> float:
    """From the full logits of the pair alone."""
    text = pair.context + pair.continuation
    log_probabilities = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[i - 1, text[i]].item() for i in range(max(1, len(pair.context)), len(text)))


def test_log_likelihoods_are_those_of_the_full_logits(model: PreTrainedModel) -> None:
    pairs = random_pairs()
    expected = [plain_log_likelihood(model, pair) for pair in pairs]
    assert log_likelihoods(model, pairs) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_log_likelihoods_do_not_depend_on_the_batches(
    batch_tokens: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = random_pairs()
    expected = log_likelihoods(model, pairs)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    assert log_likelihoods(model, pairs) == pytest.approx(expected, abs=1e-4)


def test_choices_of_one_token_are_read_off_one_forward_pass(model: PreTrainedModel) -> None:
    rows: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    log_likelihoods(model, [Encoded((5, 6, 7), (token,)) for token in (1, 2, 3, 4)])
    hook.remove()
    assert rows == [1]


def test_a_continuation_that_fills_the_limit_is_scored_from_its_second_token(model: PreTrainedModel) -> None:
    """A choice longer than `max_tokens` loses its whole context; the first token has nothing to follow."""
    pairs = [Encoded((), random_tokens(12, 1), truncated=True), Encoded((3,), random_tokens(11, 2))]
    expected = [plain_log_likelihood(model, pair) for pair in pairs]
    assert log_likelihoods(model, pairs) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_predicted_choices_do_not_depend_on_the_batches(
    batch_tokens: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["hellaswag"]
    tests = encode_test(tokenizer, task, embedded_rows("hellaswag", "validation")[:20], PROTOCOL)
    expected = []
    for choices in tests.encoded:
        values = [plain_log_likelihood(model, choice) for choice in choices]
        expected.append(values.index(max(values)))
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    outcomes = score(model, tokenizer, tests, PROTOCOL).outcomes
    assert [outcome.predicted for outcome in outcomes] == expected
    assert len(set(expected)) > 1
    assert [outcome.correct for outcome in outcomes] == [p == g for p, g in zip(expected, tests.golds, strict=True)]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int, end: int) -> list[int]:
    """Token by token, the whole text read again for each."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1] != end:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def greedy_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The continuation of each of `PROMPTS`."""
    return [
        tokenizer.decode(greedy(model, prompt, count, tokenizer.eos_token_id), skip_special_tokens=True)
        for prompt in PROMPTS
    ]


PROMPTS = [random_tokens(count, count) for count in (1, 5, 20, 31, 33, 40, 70, 71)]


def test_generated_texts_are_greedy_for_prompts_of_all_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = greedy_texts(model, tokenizer, 12)
    assert len(set(expected)) > len(PROMPTS) // 2, "or the prompts are not tested"
    assert generate(model, tokenizer, PROMPTS, 12, until=()) == expected


def test_generated_texts_come_in_the_order_of_the_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, tokenizer, PROMPTS, 6, until=())
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 1)
    backwards = [*PROMPTS[::-1], PROMPTS[3]]
    assert generate(model, tokenizer, backwards, 6, until=()) == [*expected[::-1], expected[3]]


def test_generation_ends_at_the_end_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = greedy(model, PROMPTS[2], 12, end=-1)
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = tokenizer.convert_ids_to_tokens(ids[-1])
    expected = tokenizer.decode(ids[: ids.index(ids[-1]) + 1])
    assert generate(model, ended, PROMPTS[2:3], 50, until=()) == [expected]


@pytest.mark.parametrize("limit", [1, 5])
def test_generation_respects_the_limit_of_new_tokens(
    limit: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert generate(model, tokenizer, PROMPTS, limit, until=()) == greedy_texts(model, tokenizer, limit)


def test_until_cuts_at_the_earliest_stop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = generate(model, tokenizer, PROMPTS[:1], 12, until=())[0]
    late, early = whole[-3:], whole[2:5]
    stops = (late, early, "not in the text")
    assert generate(model, tokenizer, PROMPTS[:1], 12, until=stops)[0] == whole[: whole.index(early)]


def answer_with(texts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "generate", lambda *_: list(texts))


def test_generated_answers_are_extracted_and_compared(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": "q", "answer": "so\n#### 1,234"}] * 3
    tests = encode_test(tokenizer, TASKS["gsm8k"], rows, PROTOCOL)
    answer_with([" #### 1234.", " #### 12", " no number"], monkeypatch)
    assert score(model, tokenizer, tests, PROTOCOL).outcomes == (
        Outcome(0, True, "1234", "1234", " #### 1234."),
        Outcome(1, False, "12", "1234", " #### 12"),
        Outcome(2, False, None, "1234", " no number"),
    )


def test_generation_is_asked_for_what_the_task_says(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(evaluate, "generate", lambda *arguments: asked.append(arguments[2:]) or [""])
    tests = encode_test(tokenizer, TASKS["gsm8k"], [{"question": "How many?", "answer": "#### 1"}], PROTOCOL)
    score(model, tokenizer, tests, PROTOCOL)
    [(prompts, limit, until)] = asked
    assert tokenizer.decode(prompts[0]) == "Question: How many?\nAnswer:"
    assert (limit, until) == (8, TASKS["gsm8k"].until)


def test_equal_choices_go_to_the_first(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "log_likelihoods", lambda model, pairs: [-1.0] * len(pairs))
    rows = [{"question": "is it", "passage": "It is.", "answer": answer} for answer in (False, True)]
    outcomes = score(model, tokenizer, encode_test(tokenizer, TASKS["boolq"], rows, PROTOCOL), PROTOCOL).outcomes
    assert outcomes == (Outcome(0, True, 0, 0, [-1.0, -1.0]), Outcome(1, False, 0, 1, [-1.0, -1.0]))


def scored(*correct: bool) -> Scored:
    return Scored(tuple(Outcome(i, c, None, None, None) for i, c in enumerate(correct)))


def test_accuracy_and_its_standard_error_by_hand() -> None:
    result = scored(True, True, False, True)
    assert result.accuracy == 0.75
    assert result.accuracy_stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5) == 0.25


def test_the_standard_error_is_that_of_a_sample_mean() -> None:
    result = scored(*(i % 3 == 0 for i in range(50)))
    outcomes = torch.tensor([float(o.correct) for o in result.outcomes])
    assert result.accuracy_stderr == pytest.approx(float(outcomes.std() / 50**0.5))


def test_one_example_has_no_standard_error() -> None:
    assert scored(True).accuracy_stderr is None


def test_truncated_rows_are_counted_once() -> None:
    whole, cut = Encoded((1, 2), (3,)), Encoded((2,), (3,), truncated=True)
    tests = TestSet(TASKS["boolq"], (0, 1, 0, 1), ((whole, whole), (whole, cut), (cut, cut), (whole, whole)))
    assert tests.truncated_fraction == 0.5


@pytest.mark.parametrize(("name", "choices"), [("boolq", 2), ("hellaswag", 4), ("gsm8k", 1)])
def test_long_prompts_lose_their_start(name: str, choices: int, tokenizer: PreTrainedTokenizerBase) -> None:
    task = TASKS[name]
    rows = embedded_rows(name, task.test_split)[:10]
    whole = encode_test(tokenizer, task, rows, PROTOCOL)
    cut = encode_test(tokenizer, task, rows, Protocol(max_tokens=8))
    assert whole.golds == cut.golds == tuple(task.gold(row) for row in rows)
    assert {len(row) for row in whole.encoded} == {choices}
    assert whole.truncated_fraction == 0.0
    assert cut.truncated_fraction == 1.0
    for before, after in zip(whole.encoded, cut.encoded, strict=True):
        for long, short in zip(before, after, strict=True):
            text = short.context + short.continuation
            assert len(text) <= 8
            assert (long.context + long.continuation)[-len(text) :] == text


@pytest.mark.parametrize(("name", "said"), [("boolq", "log-likelihoods must be finite"), ("gsm8k", "logits must be")])
def test_a_model_that_overflows_gets_no_accuracy(
    name: str, said: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(torch.nan)
    tests = encode_test(tokenizer, TASKS[name], embedded_rows(name, TASKS[name].test_split)[:4], PROTOCOL)
    with pytest.raises(RunError, match=said):
        score(broken, tokenizer, tests, PROTOCOL)
