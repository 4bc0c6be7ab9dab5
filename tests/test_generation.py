from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import counted, random_tokens, rows_read, tokens_read
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tune_sparse.errors import RunError
from tune_sparse.evaluation import generation
from tune_sparse.evaluation.generation import LOOK_EVERY, LOOK_EVERY_ON_CPU, SHRINK_BELOW, generate
from tune_sparse.models.checkpoints import load_model

PROMPTS = [random_tokens(count, count) for count in (1, 5, 20, 31, 33, 40, 70, 71)]
"""On both sides of Mistral's window of 32; some cross it while they are answered."""


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int, end: int) -> list[int]:
    """Token by token, the whole text read again for each, up to and without `end`."""
    ids: list[int] = []
    while len(ids) < count:
        ids.append(int(model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == end:
            return ids[:-1]
    return ids


def texts_of(*given: Any, **named: Any) -> list[str]:
    return [answer.text for answer in generate(*given, **named)]


def greedy_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], count: int
) -> list[str]:
    return [
        tokenizer.decode(greedy(model, prompt, count, tokenizer.eos_token_id), skip_special_tokens=True)
        for prompt in prompts
    ]


def ending_at(tokenizer: PreTrainedTokenizerBase, token: int) -> PreTrainedTokenizerBase:
    """The tokenizer with another end-of-text token."""
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = tokenizer.convert_ids_to_tokens(token)
    assert ended.eos_token_id == token
    return ended


def test_texts_are_greedy_for_prompts_of_all_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = greedy_texts(model, tokenizer, PROMPTS, 12)
    assert len(set(expected)) > len(PROMPTS) // 2, "or the prompts are not tested"
    assert texts_of(model, tokenizer, PROMPTS, 12, until=()) == expected


def test_texts_come_in_the_order_of_the_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = texts_of(model, tokenizer, PROMPTS, 6, until=())
    backwards = [*PROMPTS[::-1], PROMPTS[3]]
    assert texts_of(model, tokenizer, backwards, 6, until=()) == [*expected[::-1], expected[3]]


def test_a_prompt_is_read_once_and_then_a_token_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with counted(model.model, tokens_read) as tokens, counted(model.lm_head, len) as logits:
        texts_of(model, tokenizer, PROMPTS[2:4], 5, until=())
    assert tokens == [2 * 31, 2, 2, 2, 2]
    assert logits == [2] * 5, "logits of the last token alone"


def test_a_text_ends_before_the_end_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = greedy(model, PROMPTS[2], 12, end=-1)
    ended = ending_at(tokenizer, ids[-1])
    with counted(model.model, rows_read) as passes:
        found = texts_of(model, ended, PROMPTS[2:3], 50, until=())
    before = ids[: ids.index(ids[-1])]
    assert found == [tokenizer.decode(before)]
    assert len(passes) == -(-(len(before) + 1) // LOOK_EVERY_ON_CPU) * LOOK_EVERY_ON_CPU, "seen at the next look"


def test_a_text_that_ends_at_once_is_empty(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    [first] = greedy(model, PROMPTS[2], 1, end=-1)
    assert texts_of(model, ending_at(tokenizer, first), PROMPTS[2:3], 50, until=()) == [""]


def test_rows_leave_the_batch_when_they_end_and_the_others_go_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """More than half of the rows end with the fifth token of the same answer."""
    prompts = [*PROMPTS, *PROMPTS[2:3] * len(PROMPTS)]
    ended = ending_at(tokenizer, greedy(model, PROMPTS[2], 5, end=-1)[-1])
    expected = greedy_texts(model, ended, prompts, 24)
    with counted(model.model, rows_read) as rows:
        assert texts_of(model, ended, prompts, 24, until=()) == expected
    assert len(rows) == 24
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == len(prompts)
    assert rows[-1] < SHRINK_BELOW * len(prompts)


def test_an_answer_is_cut_where_neither_an_end_nor_a_stop_came_before_the_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The end of text, or the last token of a stop, may be the last token that the limit allows."""
    ids = greedy(model, PROMPTS[2], 12, end=-1)
    place = next(i for i in range(4, 12) if ids[i] not in ids[:i])
    ended, stop = ending_at(tokenizer, ids[place]), tokenizer.decode(ids[: place + 1])
    for limit, is_cut in ((place, True), (place + 1, False), (place + 2, False)):
        for who, until in ((ended, ()), (tokenizer, (stop,))):
            [answer] = generate(model, who, PROMPTS[2:3], limit, until)
            assert answer.is_cut is is_cut


@pytest.mark.parametrize("limit", [1, 5])
def test_the_limit_of_new_tokens_is_kept(
    limit: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = greedy_texts(model, tokenizer, PROMPTS, limit)
    with counted(model.model, rows_read) as passes:
        assert texts_of(model, tokenizer, PROMPTS, limit, until=()) == expected
    assert len(passes) == limit


def test_a_text_is_cut_at_the_earliest_stop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    [whole] = texts_of(model, tokenizer, PROMPTS[:1], 12, until=())
    late, early = whole[-3:], whole[2:5]
    stops = (late, early, "not in the text")
    assert texts_of(model, tokenizer, PROMPTS[:1], 12, until=stops) == [whole[: whole.index(early)]]


@pytest.mark.parametrize("start", range(1, 2 * LOOK_EVERY_ON_CPU))
def test_a_stop_that_two_looks_share_is_found_wherever_it_begins(
    start: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A stop of three tokens, whichever step it begins at: the text ends at the next look."""
    ids = greedy(model, PROMPTS[5], 20, end=-1)
    whole, stop = tokenizer.decode(ids), tokenizer.decode(ids[start : start + 3])
    with counted(model.model, rows_read) as passes:
        found = texts_of(model, tokenizer, PROMPTS[5:6], 20, until=(stop,))
    assert found == [whole[: whole.index(stop)]]
    assert len(passes) <= -(-(start + 3) // LOOK_EVERY_ON_CPU) * LOOK_EVERY_ON_CPU


def test_answers_stopped_by_a_text_leave_the_batch_too(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = greedy_texts(model, tokenizer, PROMPTS, 20)
    stop = expected[2][1:6]
    cut = [text[: text.index(stop)] if stop in text else text for text in expected]
    assert any(a == b for a, b in zip(cut, expected, strict=True)), "or all texts have the stop"
    assert texts_of(model, tokenizer, PROMPTS, 20, until=(stop,)) == cut


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_overflows_writes_nothing(
    value: float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(value)
    with pytest.raises(RunError, match="logits must be finite, got NaN or inf for a test prompt"):
        texts_of(broken, tokenizer, PROMPTS, 4, until=())


def test_bf16_answers_are_texts(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    low = load_model(folder, torch.bfloat16, torch.device("cpu"))
    texts = texts_of(low, tokenizer, PROMPTS, 4, until=())
    assert len(texts) == len(PROMPTS)
    assert all(texts)


def test_answers_do_not_depend_on_when_they_are_looked_at(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers end at an end of text, at a stop or at the limit; what a row writes after its end counts for nothing."""
    ended = ending_at(tokenizer, greedy(model, PROMPTS[2], 5, end=-1)[-1])
    stop = greedy_texts(model, ended, PROMPTS[5:6], 20)[0][3:7]
    found = []
    for look_every in (1, LOOK_EVERY_ON_CPU, LOOK_EVERY):
        monkeypatch.setattr(generation, "LOOK_EVERY_ON_CPU", look_every)
        found.append(texts_of(model, ended, PROMPTS, 20, until=(stop,)))
    assert found[0] == found[1] == found[2]
    assert len({len(text) for text in found[0]}) > 2


def test_prompts_of_one_length_are_answered_without_a_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    same = [random_tokens(20, seed) for seed in range(3)]
    masks: list[object] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    expected = greedy_texts(model, tokenizer, same, 6)
    masks.clear()
    assert texts_of(model, tokenizer, same, 6, until=()) == expected
    assert masks == [None] * 6
    texts_of(model, tokenizer, [*same, PROMPTS[3]], 6, until=())
    hook.remove()
    assert masks[6] is None, "prompts are padded on the right, where a causal model does not look"
    assert [mask.shape for mask in masks[7:]] == [(4, 1, 1, 31 + n) for n in range(1, 6)]
