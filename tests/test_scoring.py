from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tune_sparse.config import Protocol
from tune_sparse.data.splits import Encoded, encode_pairs
from tune_sparse.data.synthetic import synthetic_examples
from tune_sparse.data.task_types import Example, Task
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError, RunError
from tune_sparse.evaluation import scoring
from tune_sparse.evaluation.metrics import compute_metrics
from tune_sparse.evaluation.outcomes import Outcome
from tune_sparse.evaluation.scoring import EvalExample, EvalSet, compute_outcomes, encode_test, few_shot_prefixes, score
from tune_sparse.training.budgets import CPU_BUDGETS

PROTOCOL = Protocol(max_tokens=256, max_new_tokens=8, precision="float32")
BOOLQ, HELLASWAG, GSM8K, TEXT = (TASKS[name] for name in ("boolq", "hellaswag", "gsm8k", "tinyshakespeare"))


def load_examples(task: Task, count: int) -> list[Example]:
    if task is TEXT:
        passages = [example["passage"] for example in synthetic_examples("boolq", "validation")[: 4 * count]]
        return [{"text": "\n".join(passages)}]
    return synthetic_examples(task.name, task.test_split)[:count]


def eval_set(tokenizer: PreTrainedTokenizerBase, task: Task, count: int, **settings: Any) -> EvalSet:
    return encode_test(tokenizer, task, load_examples(task, count), replace(PROTOCOL, **settings))


# What a model is given.


def test_choices_are_encoded_with_their_gold_and_their_lengths_in_characters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    examples = load_examples(HELLASWAG, 3)
    tests = encode_test(tokenizer, HELLASWAG, examples, PROTOCOL)
    assert tests.task is HELLASWAG
    for example, encoded in zip(examples, tests.examples, strict=True):
        assert encoded.id == HELLASWAG.question_id(example)
        assert encoded.gold == example["label"]
        assert list(encoded.encoded) == encode_pairs(tokenizer, HELLASWAG.pairs(example), 256)
        assert encoded.lengths == tuple(map(len, example["endings"]))


def test_questions_are_encoded_without_their_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = load_examples(GSM8K, 3)
    for example, encoded in zip(examples, encode_test(tokenizer, GSM8K, examples, PROTOCOL).examples, strict=True):
        assert encoded.gold == GSM8K.gold(example)
        [prompt] = encoded.encoded
        assert tokenizer.decode(prompt.context) == f"Question: {example['question']}\nAnswer:"
        assert prompt.continuation == ()


def test_a_text_is_windows_of_the_longest_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = load_examples(TEXT, 20)
    ids = tokenizer(example["text"])["input_ids"]
    examples = eval_set(tokenizer, TEXT, 20, max_tokens=64).examples
    assert [example.id for example in examples] == [f"window {i}" for i in range(len(ids) // 64)]
    assert [len(e.context + e.continuation) for example in examples for e in example.encoded] == [64] * len(examples)
    few = eval_set(tokenizer, TEXT, 20, max_tokens=64, n_test=2).examples
    assert few == tuple(example for example in examples if example in few) != examples[:2]


@pytest.mark.parametrize("text", ["a", "<|endoftext|>"])
def test_a_text_in_which_no_token_follows_another_is_refused(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    with pytest.raises(InputError, match=r"tinyshakespeare.*tokens"):
        encode_test(tokenizer, TEXT, [{"text": text}], PROTOCOL)


@pytest.mark.parametrize("name", ["boolq", "hellaswag"])
def test_a_prompt_beyond_the_limit_loses_its_start_and_is_counted(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A model reads all but the last token of a pair, so that a pair may have one more than `max_tokens`."""
    whole = eval_set(tokenizer, TASKS[name], 10)
    cut = eval_set(tokenizer, TASKS[name], 10, max_tokens=12)
    assert not any(example.is_truncated for example in whole.examples)
    assert all(example.is_truncated for example in cut.examples)
    for before, after in zip(whole.examples, cut.examples, strict=True):
        assert (before.id, before.gold, before.lengths) == (after.id, after.gold, after.lengths)
        for long, short in zip(before.encoded, after.encoded, strict=True):
            assert short.continuation == long.continuation
            assert len(short.context + short.continuation) == 13
            assert short.context == long.context[-len(short.context) :]


def test_a_long_question_leaves_room_for_its_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    [whole, cut] = (eval_set(tokenizer, GSM8K, 5, max_tokens=limit).examples for limit in (256, 20))
    for before, after in zip(whole, cut, strict=True):
        assert after.encoded == (Encoded(before.encoded[0].context[-12:], (), truncated=True),)


def test_an_example_of_which_one_choice_is_truncated_is_truncated_once() -> None:
    whole, cut = Encoded((1, 2), (3,)), Encoded((2,), (3,), truncated=True)
    examples = [EvalExample("", "0", pair) for pair in ((whole, whole), (whole, cut), (cut, cut))]
    assert [example.is_truncated for example in examples] == [False, True, True]


def test_a_choice_of_more_tokens_than_a_model_may_read_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    example = dict(load_examples(HELLASWAG, 1)[0])
    example["endings"] = [*example["endings"][:3], "tall trees " * 40]
    message = r"a choice must have between 1 and max_tokens = 64 tokens, hellaswag has ' tall trees .*Raise max_tokens"
    with pytest.raises(InputError, match=message):
        encode_test(tokenizer, HELLASWAG, [example], replace(PROTOCOL, max_tokens=64))


def test_a_choice_that_just_fits_follows_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = dict(load_examples(HELLASWAG, 1)[0])
    example["endings"] = [*example["endings"][:3], "tall trees " * 10]
    ending = encode_test(tokenizer, HELLASWAG, [example], PROTOCOL).examples[0].encoded[3].continuation
    [fitting] = encode_test(tokenizer, HELLASWAG, [example], replace(PROTOCOL, max_tokens=len(ending))).examples
    assert len(fitting.encoded[3].context) == 1
    with pytest.raises(InputError, match="a choice must have"):
        encode_test(tokenizer, HELLASWAG, [example], replace(PROTOCOL, max_tokens=len(ending) - 1))


# Worked examples before a question; tests/test_harness.py compares the drawn ones with those of the harness.


def test_without_shots_nothing_is_before_a_prompt() -> None:
    assert few_shot_prefixes(BOOLQ, load_examples(BOOLQ, 2), (), 0) == ["", ""]


@pytest.mark.parametrize("task", [BOOLQ, GSM8K], ids=lambda task: task.name)
def test_shots_are_whole_examples_of_the_pool(task: Task) -> None:
    pool = synthetic_examples(task.name, "train")[:10]
    shown = {"".join(task.training_pair(example)) for example in pool}
    prefixes = few_shot_prefixes(task, load_examples(task, 20), pool, 3)
    for prefix in prefixes:
        *examples, rest = prefix.split("\n\n")
        assert rest == ""
        assert len(set(examples)) == 3
        assert set(examples) <= shown
    assert len(set(prefixes)) > 10
    assert prefixes == few_shot_prefixes(task, load_examples(task, 20), pool, 3)


def test_an_example_is_never_an_example_of_itself() -> None:
    pool = load_examples(BOOLQ, 4)
    prefixes = few_shot_prefixes(BOOLQ, pool * 5, pool, 3)
    for example, prefix in zip(pool * 5, prefixes, strict=True):
        assert example["passage"] not in prefix
        assert prefix.count("Question:") == 3


def test_a_pool_full_of_the_example_itself_is_drawn_from_again() -> None:
    example, other = load_examples(BOOLQ, 2)
    prefixes = few_shot_prefixes(BOOLQ, [example] * 20, [example] * 5 + [other], 1)
    assert set(prefixes) == {"".join(BOOLQ.training_pair(other)) + "\n\n"}


def test_the_first_examples_have_the_same_shots_however_many_follow() -> None:
    pool = synthetic_examples("gsm8k", "train")[:10]
    assert few_shot_prefixes(GSM8K, load_examples(GSM8K, 9), pool, 2)[:4] == few_shot_prefixes(
        GSM8K, load_examples(GSM8K, 4), pool, 2
    )


def test_a_prompt_is_asked_after_its_shots(tokenizer: PreTrainedTokenizerBase) -> None:
    pool = synthetic_examples("boolq", "train")[:10]
    examples, protocol = load_examples(BOOLQ, 4), replace(PROTOCOL, num_fewshot=2)
    prefixes = few_shot_prefixes(BOOLQ, examples, pool, 2)
    plain = encode_test(tokenizer, BOOLQ, examples, PROTOCOL)
    shown = encode_test(tokenizer, BOOLQ, examples, protocol, pool)
    for prefix, before, after in zip(prefixes, plain.examples, shown.examples, strict=True):
        assert (before.id, before.lengths) == (after.id, after.lengths)
        for zero_shot, num_fewshot in zip(before.encoded, after.encoded, strict=True):
            assert tokenizer.decode(num_fewshot.context) == prefix + tokenizer.decode(zero_shot.context)
            assert num_fewshot.continuation == zero_shot.continuation


# What becomes of its answers.


def example_choices(*lengths: int, gold: str = "0") -> EvalSet:
    choice = Encoded((1,), (2,))
    return EvalSet(HELLASWAG, (EvalExample("a", gold, (choice,) * len(lengths), lengths),))


def patch_likelihoods(values: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "log_likelihoods", lambda model, questions, limit: [list(values)] * len(questions))


@pytest.mark.parametrize(
    ("values", "lengths", "gold", "predicted", "correct", "correct_norm"),
    [
        ([-4.0, -2.0, -3.0], (1, 1, 1), "1", "1", True, True),
        ([-4.0, -2.0, -3.0], (8, 2, 3), "0", "1", False, True),
        ([-4.0, -2.0, -3.0], (8, 2, 3), "1", "1", True, False),
        ([-2.0, -2.0], (1, 1), "0", "0", True, True),
        ([-2.0, -2.0], (1, 1), "1", "0", False, False),
        ([-2.0, -4.0], (1, 2), "0", "0", True, True),
    ],
)
def test_the_first_of_the_likeliest_choices_is_the_prediction(
    values: list[float],
    lengths: tuple[int, ...],
    gold: str,
    predicted: str,
    correct: bool,
    correct_norm: bool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch_likelihoods(values, monkeypatch)
    [outcome] = score(model, tokenizer, [example_choices(*lengths, gold=gold)], PROTOCOL).outcomes
    assert outcome == Outcome(
        "hellaswag", "a", gold, predicted, correct, correct_norm, None, tuple(values), None, truncated=False
    )


def test_tasks_without_a_normalised_accuracy_have_none(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    scored = score(model, tokenizer, [eval_set(tokenizer, BOOLQ, 4)], PROTOCOL)
    assert {outcome.correct_norm for outcome in scored.outcomes} == {None}
    assert "accuracy_norm" not in scored.metrics
    assert "f1" in scored.metrics


def answers(texts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The model answers so; returns what it was given."""
    requests: list[tuple[Any, ...]] = []
    monkeypatch.setattr(scoring, "generate", lambda *given: requests.append(given[2:]) or list(texts))
    return requests


def test_answers_are_extracted_and_compared(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = {"question": "q", "answer": "so\n#### 1,234"}
    texts = [" #### 1234.", " #### 12, not 1,234", " no number"]
    answers(texts, monkeypatch)
    found = score(model, tokenizer, [encode_test(tokenizer, GSM8K, [example] * 3, PROTOCOL)], PROTOCOL).outcomes
    known = [(o.gold, o.predicted, o.correct, o.correct_flexible, o.text) for o in found]
    assert known == [
        ("1234", "1234", True, True, texts[0]),
        ("1234", "12", False, True, texts[1]),
        ("1234", None, False, False, texts[2]),
    ]


def test_generation_is_asked_for_what_the_task_says(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = answers([""], monkeypatch)
    tests = encode_test(tokenizer, GSM8K, [{"question": "How many?", "answer": "#### 1"}], PROTOCOL)
    score(model, tokenizer, [tests], PROTOCOL)
    [([prompt], limit, until)] = requests
    assert tokenizer.decode(prompt) == "Question: How many?\nAnswer:"
    assert (limit, until) == (8, GSM8K.until)


def test_the_perplexity_is_that_of_transformers_own_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tests = eval_set(tokenizer, TEXT, 20, max_tokens=64)
    windows = [e.context + e.continuation for example in tests.examples for e in example.encoded]
    with torch.no_grad():
        ids = [torch.tensor([window]) for window in windows]
        losses = [model(input_ids=i, labels=i).loss.double().item() for i in ids]
    scored = score(model, tokenizer, [tests], PROTOCOL)
    assert [o.log_likelihoods for o in scored.outcomes] == [(pytest.approx(-loss, abs=1e-5),) for loss in losses]
    assert scored.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert scored.metrics["n_examples"] == len(windows) > 4


def test_several_tasks_are_scored_in_their_order(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tests = [eval_set(tokenizer, GSM8K, 3), eval_set(tokenizer, BOOLQ, 5)]
    scored = score(model, tokenizer, tests, PROTOCOL)
    alone = [score(model, tokenizer, [test], PROTOCOL) for test in tests]
    assert scored.outcomes == alone[0].outcomes + alone[1].outcomes
    assert scored.by_task == alone[0].by_task | alone[1].by_task
    assert list(scored.by_task) == ["gsm8k", "boolq"]
    accuracies = [one.metrics["accuracy"] for one in alone]
    assert scored.metrics["accuracy"] == sum(value for value in accuracies if value is not None) / 2


def test_outcomes_are_in_the_order_of_the_examples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tests = eval_set(tokenizer, HELLASWAG, 20)
    scored = score(model, tokenizer, [tests], PROTOCOL, replace(CPU_BUDGETS, scoring_tokens=200))
    assert [outcome.id for outcome in scored.outcomes] == [example.id for example in tests.examples]
    assert len({outcome.predicted for outcome in scored.outcomes}) > 1
    assert scored.metrics == compute_metrics(scored.outcomes, 0.25, None)


# Stopped, and gone on.

KINDS = pytest.mark.parametrize("task", [HELLASWAG, GSM8K, TEXT], ids=lambda task: task.name)


@KINDS
def test_a_stopped_scoring_goes_on_to_the_same_bits(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Whichever batches were done before, and whichever examples of them are still known."""
    protocol = replace(PROTOCOL, max_tokens=64)
    budgets = replace(CPU_BUDGETS, scoring_tokens=120, generation_tokens=120)
    tests = eval_set(tokenizer, task, 24, max_tokens=64)
    batches = list(compute_outcomes(model, tokenizer, tests, protocol, budgets=budgets))
    whole = {i: outcome for batch in batches for i, outcome in batch.items()}
    assert len(batches) >= 4
    assert sorted(whole) == list(range(len(tests.examples)))
    rng = random.Random(task.name)
    for done in (
        {i for batch in batches[:2] for i in batch},
        {i for batch in rng.sample(batches, len(batches) // 2) for i in batch},
        set(rng.sample(sorted(whole), len(whole) // 2)),
        set(whole),
    ):
        rest = list(compute_outcomes(model, tokenizer, tests, protocol, done, budgets))
        found = {i: outcome for batch in rest for i, outcome in batch.items()}
        assert found == {i: outcome for i, outcome in whole.items() if i not in done}
        assert len(rest) == sum(not batch.keys() <= done for batch in batches), "a known batch is not computed"


def test_a_scoring_computes_only_what_is_taken(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    passes: Counter[str] = Counter()
    hook = model.model.register_forward_pre_hook(lambda module, args: passes.update(["pass"]))
    batches = compute_outcomes(
        model, tokenizer, eval_set(tokenizer, HELLASWAG, 24), PROTOCOL, budgets=replace(CPU_BUDGETS, scoring_tokens=200)
    )
    next(batches)
    hook.remove()
    assert passes["pass"] == 1


@pytest.mark.parametrize(
    ("task", "message"),
    [(BOOLQ, "log-likelihoods must be finite"), (TEXT, "log-likelihoods must be finite"), (GSM8K, "logits must be")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_model_that_overflows_gets_no_metrics(
    task: Task, message: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(RunError, match=message):
        score(broken, tokenizer, [eval_set(tokenizer, task, 4)], PROTOCOL)
