"""Examples, prompts and texts as a model's tokens (tune_sparse.data.splits)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from factories import boolq_examples, prompt_task
from transformers import PreTrainedTokenizerBase

from tune_sparse.data.splits import (
    Encoded,
    encode_answers,
    encode_pairs,
    encode_prompts,
    encode_training,
    encode_windows,
)
from tune_sparse.data.tasks import TASKS
from tune_sparse.models.checkpoints import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(llama)


def list_ids(windows: list[Encoded]) -> list[int]:
    return [token for window in windows for token in window.context + window.continuation]


LONG_TEXT = "The man had seven apples and gave two away. " * 20


def test_windows_lie_one_after_the_other_and_the_rest_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(LONG_TEXT)["input_ids"]
    windows = encode_windows(tokenizer, LONG_TEXT, 32)
    assert len(windows) == len(ids) // 32
    assert len(ids) % 32, "or nothing is left over"
    assert list_ids(windows) == ids[: 32 * len(windows)]
    assert {(len(w.context), len(w.continuation), w.truncated) for w in windows} == {(1, 31, False)}


def test_a_text_of_whole_windows_loses_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(LONG_TEXT)["input_ids"]
    size = next(n for n in range(2, len(ids)) if len(ids) % n == 0)
    assert list_ids(encode_windows(tokenizer, LONG_TEXT, size)) == ids


def test_a_text_shorter_than_a_window_is_one(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("The man had seven apples.")["input_ids"]
    [window] = encode_windows(tokenizer, "The man had seven apples.", 2048)
    assert list_ids([window]) == ids


def test_a_text_longer_than_the_model_warns_of_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """Windows are cut from it; transformers would warn that the whole is too long (warnings are errors here)."""
    assert len(encode_windows(tokenizer, LONG_TEXT * 20, 512)) > 4


def test_a_text_is_learned_in_windows_and_a_prompt_with_its_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    example = {"text": LONG_TEXT}
    windows = encode_windows(tokenizer, LONG_TEXT, 32)
    few = encode_training(tokenizer, TASKS["wikitext2"], [example], 32, 3)
    assert few == [window for window in windows if window in few]
    assert len(few) == 3
    assert encode_training(tokenizer, TASKS["wikitext2"], [example], 32, 1000) == windows
    examples = boolq_examples(3)
    pairs = [prompt_pair(example) for example in examples]
    assert encode_training(tokenizer, prompt_task("boolq"), examples, 64, 1) == encode_answers(tokenizer, pairs, 64)


def prompt_pair(example: Any) -> tuple[str, str]:
    return prompt_task("boolq").training_pair(example)


# Pairs and prompts.


def harness_split(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """`TemplateLM._encode_pair` of lm-evaluation-harness 0.4.13 for causal models."""
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole = tokenizer(context + continuation)["input_ids"]
    alone = tokenizer(context)["input_ids"]
    return alone, whole[len(alone) :]


PAIRS = [
    ("Question: is ice cold?\nAnswer:", " yes"),
    ("Ends in spaces:  ", "yes"),
    ("Ends in a new line\n", " yes"),
    ("Ann beat Bea as Ann", " was fast."),
    ("no space be", "tween"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_is_split_where_the_harness_splits_it(tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str]) -> None:
    [encoded] = encode_pairs(tokenizer, [pair], 512)
    assert (list(encoded.context), list(encoded.continuation)) == harness_split(tokenizer, *pair)
    assert not encoded.truncated


def test_trailing_spaces_of_the_context_move_to_the_continuation(tokenizer: PreTrainedTokenizerBase) -> None:
    [moved, plain] = encode_pairs(tokenizer, [("Answer: ", "yes"), ("Answer:", " yes")], 512)
    assert moved == plain
    assert tokenizer.decode(moved.context) == "Answer:"
    assert tokenizer.decode(moved.continuation) == " yes"


def test_a_long_pair_loses_the_start_of_its_context(tokenizer: PreTrainedTokenizerBase) -> None:
    pair = ("The man had seven apples and gave two away. Question: is ice cold?\nAnswer:", " yes")
    [whole] = encode_pairs(tokenizer, [pair], 512)
    limit = len(whole.context) + len(whole.continuation) - 5
    [cut] = encode_pairs(tokenizer, [pair], limit)
    assert cut == Encoded(whole.context[5:], whole.continuation, truncated=True)
    [fits] = encode_pairs(tokenizer, [pair], limit + 5)
    assert fits == whole


def test_a_continuation_longer_than_the_limit_keeps_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    [whole] = encode_pairs(tokenizer, [("Answer:", " the man had seven apples")], 512)
    assert len(whole.continuation) > 2
    [cut] = encode_pairs(tokenizer, [("Answer:", " the man had seven apples")], 2)
    assert cut == Encoded((), whole.continuation[-2:], truncated=True)


def test_a_prompt_keeps_its_last_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = "Question: how many apples are there?\nAnswer:"
    ids = tuple(tokenizer(prompt)["input_ids"])
    assert encode_prompts(tokenizer, [prompt], len(ids)) == [Encoded(ids, (), truncated=False)]
    assert encode_prompts(tokenizer, [prompt], len(ids) - 1) == [Encoded(ids[1:], (), truncated=True)]


def test_an_answer_ends_with_the_end_of_text_within_the_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    pair = ("Ice is frozen water. " * 5 + "\nQuestion: is ice cold?\nAnswer:", " yes")
    [encoded] = encode_answers(tokenizer, [pair], 12)
    assert encoded.continuation[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.continuation[:-1]) == " yes"
    assert len(encoded.context) + len(encoded.continuation) == 12
    assert encoded.truncated
