from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import boolq_examples, write_boolq, write_jsonl

from tune_sparse.config import Protocol
from tune_sparse.data.splits import (
    LEAK_CHARACTERS,
    Splits,
    fingerprint_splits,
    load_splits,
    load_test,
    read_examples_file,
)
from tune_sparse.data.task_types import PromptTask, TextTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError

BOOLQ = TASKS["boolq"]
SMALL = Protocol(n_selection=4)


def arc_examples(prefix: str, count: int) -> list[dict[str, Any]]:
    choices = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}
    return [{"question": f"{prefix} {i}?", "choices": choices, "answerKey": "A"} for i in range(count)]


def write_arc(data_dir: Path, **splits: int) -> Path:
    for split, count in splits.items():
        write_jsonl(data_dir / "arc_easy" / f"{split}.jsonl", arc_examples(split, count))
    return data_dir


HELLASWAG_EXAMPLE = {"activity_label": "A", "ctx_a": "B.", "ctx_b": "he", "endings": list("abcd"), "label": "0"}


def prompts(examples: Any) -> list[str]:
    return [example.get("passage") or example["question"] for example in examples]


def test_selection_is_carved_from_train_where_validation_is_the_test(tmp_path: Path) -> None:
    splits = load_splits(BOOLQ, write_boolq(tmp_path, train=20, validation=6), SMALL)
    assert (len(splits.train), len(splits.selection), len(splits.test)) == (16, 4, 6)
    assert sorted(prompts(splits.train + splits.selection)) == sorted(prompts(boolq_examples(20, "train")))
    assert prompts(splits.test) == prompts(boolq_examples(6, "validation"))


def test_validation_is_the_selection_where_the_test_is_labelled(tmp_path: Path) -> None:
    splits = load_splits(TASKS["arc_easy"], write_arc(tmp_path, train=9, validation=6, test=5), SMALL)
    assert (len(splits.train), len(splits.selection), len(splits.test)) == (9, 4, 5)
    assert len({*prompts(splits.selection)} & {f"validation {i}?" for i in range(6)}) == 4
    assert prompts(splits.test) == [f"test {i}?" for i in range(5)]


def test_selection_is_carved_where_a_labelled_test_has_no_validation(tmp_path: Path) -> None:
    splits = load_splits(TASKS["arc_easy"], write_arc(tmp_path, train=9, test=5), SMALL)
    assert (len(splits.train), len(splits.selection), len(splits.test)) == (5, 4, 5)
    assert all(prompt.startswith("train") for prompt in prompts(splits.selection))


def test_no_example_is_in_two_splits(tmp_path: Path) -> None:
    splits = load_splits(BOOLQ, write_boolq(tmp_path), SMALL)
    everything = prompts(splits.train + splits.selection + splits.test)
    assert len(set(everything)) == len(everything) == 26


def test_limits_shorten_each_split(tmp_path: Path) -> None:
    whole = load_splits(BOOLQ, write_boolq(tmp_path), SMALL)
    limited = load_splits(BOOLQ, tmp_path, replace(SMALL, n_train=7, n_test=2))
    assert limited == Splits(whole.train[:7], whole.selection, limited.test)
    assert len(limited.test) == 2


def test_a_sample_of_the_test_examples_is_not_their_beginning_and_the_same_for_every_cell(tmp_path: Path) -> None:
    whole = load_splits(BOOLQ, write_boolq(tmp_path, validation=40), SMALL)
    few, more = (load_splits(BOOLQ, tmp_path, replace(SMALL, n_test=n)).test for n in (10, 20))
    assert few != whole.test[:10]
    assert [example for example in more if example in few] == list(few)
    assert [example for example in whole.test if example in more] == list(more)
    assert load_test(BOOLQ, tmp_path, Protocol(n_test=10, n_train=3)).test == few


def test_a_sample_has_each_source_of_hellaswag_in_proportion(tmp_path: Path) -> None:
    """The first tenth of the validation split is ActivityNet for the most part, the whole one third."""
    sources = ["activitynet~v_1"] * 36 + ["wikihow~2"] * 64
    examples = [{**HELLASWAG_EXAMPLE, "ctx_a": f"Scene {i}.", "source_id": s} for i, s in enumerate(sources)]
    write_jsonl(tmp_path / "hellaswag" / "validation.jsonl", examples)
    sample = load_test(TASKS["hellaswag"], tmp_path, Protocol(n_test=25)).test
    assert sum(example["source_id"].startswith("activitynet") for example in sample) == 9


@pytest.mark.parametrize("fields", [{}, {"source_id": "wikihow~2", "split_type": "zeroshot"}, {"source_id": 7}])
def test_the_source_of_an_example_need_not_be_known(fields: dict[str, Any]) -> None:
    assert isinstance(TASKS["hellaswag"].source({**HELLASWAG_EXAMPLE, **fields}), str)


def test_a_tenth_of_train_is_the_selection_if_no_number_is_given(tmp_path: Path) -> None:
    splits = load_splits(BOOLQ, write_boolq(tmp_path, train=30), Protocol(n_selection=None))
    assert (len(splits.train), len(splits.selection)) == (27, 3)


def test_the_splits_repeat_and_their_order_is_shuffled(tmp_path: Path) -> None:
    first, again = (load_splits(BOOLQ, write_boolq(tmp_path), SMALL) for _ in range(2))
    assert first == again
    assert first.fingerprint == again.fingerprint
    order = prompts(first.selection + first.train)
    assert order != prompts(boolq_examples(20, "train"))


def test_the_fingerprint_changes_with_any_example_and_any_order() -> None:
    examples = tuple(boolq_examples(4))
    splits = Splits(examples[:2], examples[2:3], examples[3:])
    changed = [
        Splits(examples[1::-1], examples[2:3], examples[3:]),
        Splits(examples[:1], examples[1:3], examples[3:]),
        Splits(({**examples[0], "answer": True}, examples[1]), examples[2:3], examples[3:]),
        Splits(examples[:2], examples[2:3], ()),
    ]
    assert len({splits.fingerprint, *(other.fingerprint for other in changed)}) == 5


def test_synthetic_examples_need_no_folder() -> None:
    splits = load_splits(BOOLQ, None, Protocol(n_train=10, n_selection=5, n_test=3))
    assert (len(splits.train), len(splits.selection), len(splits.test)) == (10, 5, 3)


def test_a_task_without_synthetic_examples_asks_for_a_folder() -> None:
    with pytest.raises(InputError, match=r"the synthetic generator has .*boolq.*, got 'piqa'\. Give --data-dir"):
        load_splits(TASKS["piqa"], None, Protocol())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_file_is_named(tmp_path: Path, split: str) -> None:
    path = write_boolq(tmp_path) / "boolq" / f"{split}.jsonl"
    path.unlink()
    with pytest.raises(InputError, match=rf"^boolq needs the file {path}, which is missing\."):
        load_splits(BOOLQ, tmp_path, SMALL)


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"{path} must have at least one example, got an empty file\. Add examples\."):
        read_examples_file(BOOLQ, path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": ', "each line must be a JSON object: "),
        (
            "[1, 2]",
            r"an example of boolq must be an object with question, passage, answer, got \[1, 2\]\. Fix the example\.",
        ),
        ('{"question": "q"}', "an example of boolq needs the field 'passage', got question. Fix the example."),
        ('{"question": "q", "passage": "p", "answer": "yes"}', "the field 'answer' of boolq must be bool, got 'yes'"),
    ],
)
def test_a_bad_example_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(boolq_examples(1)[0]) + "\n\n" + line + "\n")
    with pytest.raises(InputError, match=rf"^{path}:3: {message}"):
        read_examples_file(BOOLQ, path)


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes('{"question": "café", "passage": "p", "answer": true}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=rf"{path}.*UTF-8"):
        read_examples_file(BOOLQ, path)


def test_unicode_line_separators_do_not_end_an_example(tmp_path: Path) -> None:
    example = {"question": "one\u2028two\x85three", "passage": "p", "answer": True}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(example, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_examples_file(BOOLQ, path) == [example]


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    examples = boolq_examples(2)
    path = tmp_path / "train.jsonl"
    path.write_bytes("".join(json.dumps(example) + "\r\n" for example in examples).encode())
    assert read_examples_file(BOOLQ, path) == examples


def test_an_example_in_train_and_test_is_refused(tmp_path: Path) -> None:
    write_boolq(tmp_path)
    leaked = boolq_examples(6, "validation")[2] | {"answer": True}
    write_jsonl(tmp_path / "boolq" / "train.jsonl", [*boolq_examples(20, "train"), leaked])
    with pytest.raises(
        InputError, match=r"no example of boolq may be in two splits, got one in \w+ and test: .*Remove it"
    ):
        load_splits(BOOLQ, tmp_path, SMALL)


def test_an_example_repeated_within_train_is_in_selection_or_in_train(tmp_path: Path) -> None:
    write_boolq(tmp_path)
    write_jsonl(tmp_path / "boolq" / "train.jsonl", boolq_examples(10, "train") * 2)
    splits = load_splits(BOOLQ, tmp_path, SMALL)
    questions = [{example["question"] for example in examples} for examples in (splits.train, splits.selection)]
    assert questions[0]
    assert not questions[0] & questions[1]


def test_a_question_with_another_worked_answer_is_the_same_example(tmp_path: Path) -> None:
    examples = [{"question": f"how many {i}?", "answer": f"#### {i}"} for i in range(10)]
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", examples)
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", [examples[0] | {"answer": "another way.\n#### 0"}])
    with pytest.raises(InputError, match="no example of gsm8k may be in two splits"):
        load_splits(TASKS["gsm8k"], tmp_path, SMALL)


def test_the_selection_must_leave_examples_to_train_on(tmp_path: Path) -> None:
    message = r"n_selection must leave examples to train on: boolq has 4 training examples, got 4\. Lower n_selection\."
    with pytest.raises(InputError, match=message):
        load_splits(BOOLQ, write_boolq(tmp_path, train=4), SMALL)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, PromptTask)])
def test_real_examples_split_without_leaks(name: str, real_examples: Path) -> None:
    splits = load_splits(TASKS[name], real_examples, Protocol(n_selection=8, n_test=16))
    assert len(splits.selection) == 8
    assert len(splits.test) == 16
    assert len(splits.train) >= 12


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, TextTask)])
def test_real_texts_split_without_leaks(name: str, real_examples: Path) -> None:
    splits = load_splits(TASKS[name], real_examples, Protocol())
    sizes = [
        len(examples[0]["text"]) for examples in (splits.train, splits.selection, splits.test) if len(examples) == 1
    ]
    assert len(sizes) == 3
    assert min(sizes) > 5_000


# The pool of worked examples.


def test_examples_are_the_whole_train_split_in_its_own_order(tmp_path: Path) -> None:
    examples = tuple(boolq_examples(20, "train"))
    splits = load_splits(BOOLQ, write_boolq(tmp_path), replace(SMALL, num_fewshot=2, n_train=3))
    assert splits.shots == examples
    assert splits.train == load_splits(BOOLQ, tmp_path, replace(SMALL, n_train=3)).train


def test_shots_are_part_of_the_fingerprint_only_where_they_are_requested(tmp_path: Path) -> None:
    write_boolq(tmp_path)
    without, two, three = (load_splits(BOOLQ, tmp_path, replace(SMALL, num_fewshot=count)) for count in (0, 2, 3))
    assert without.shots == ()
    assert without.fingerprint != two.fingerprint == three.fingerprint
    assert replace(two, shots=two.shots[::-1]).fingerprint != two.fingerprint


def test_shots_must_be_fewer_than_the_training_examples(tmp_path: Path) -> None:
    write_boolq(tmp_path)
    load_splits(BOOLQ, tmp_path, replace(SMALL, num_fewshot=19))
    with pytest.raises(
        InputError, match=r"num_fewshot must be less than the 20 training examples of boolq.*Lower it\."
    ):
        load_splits(BOOLQ, tmp_path, replace(SMALL, num_fewshot=20))


def test_no_worked_example_is_a_test_example_whatever_the_limit_of_train(tmp_path: Path) -> None:
    """Examples are drawn from all of train, also from examples that are not trained on."""
    write_boolq(tmp_path)
    leaked = boolq_examples(6, "validation")[2] | {"answer": True}
    write_jsonl(tmp_path / "boolq" / "train.jsonl", [*boolq_examples(20, "train"), leaked])
    train = load_splits(BOOLQ, tmp_path, limited(16, 1)).train
    unseen = train.index(leaked) if leaked in train else 16
    load_splits(BOOLQ, tmp_path, limited(unseen, 6))
    with pytest.raises(InputError, match="no example of boolq may be in two splits"):
        load_splits(BOOLQ, tmp_path, replace(limited(unseen, 6), num_fewshot=2))


def limited(n_train: int, n_test: int) -> Protocol:
    return replace(SMALL, n_train=n_train, n_test=n_test)


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_scoring_alone_needs_the_test_examples_and_the_shots(tmp_path: Path, num_fewshot: int) -> None:
    protocol = replace(SMALL, n_test=3, num_fewshot=num_fewshot)
    whole = load_splits(BOOLQ, write_boolq(tmp_path), protocol)
    if not num_fewshot:
        (tmp_path / "boolq" / "train.jsonl").unlink()
    assert load_test(BOOLQ, tmp_path, protocol) == replace(whole, train=(), selection=())


def test_scoring_a_text_needs_its_test_file_alone(tmp_path: Path) -> None:
    whole = load_splits(WIKITEXT, write_wikitext(tmp_path), SMALL)
    for split in ("train", "valid"):
        (tmp_path / "wikitext2" / f"{split}.txt").unlink()
    assert load_test(WIKITEXT, tmp_path, replace(SMALL, n_test=1, num_fewshot=2)) == Splits((), (), whole.test)


def test_the_fingerprint_of_a_mixture_is_of_its_tasks_in_order(tmp_path: Path) -> None:
    splits = [
        load_splits(BOOLQ, write_boolq(tmp_path), SMALL),
        load_splits(TASKS["arc_easy"], write_arc(tmp_path, train=9, validation=6, test=5), SMALL),
    ]
    assert fingerprint_splits(splits[:1]) == splits[0].fingerprint
    assert len({fingerprint_splits(splits), fingerprint_splits(splits[::-1]), *(s.fingerprint for s in splits)}) == 4


# Texts.

WIKITEXT, SHAKESPEARE = TASKS["wikitext2"], TASKS["tinyshakespeare"]


def write_wikitext(data_dir: Path, **texts: str) -> Path:
    folder = data_dir / "wikitext2"
    folder.mkdir(exist_ok=True)
    for split, text in ({"train": "a b\n", "valid": "c d\n", "test": "e f\n"} | texts).items():
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return data_dir


def write_shakespeare(data_dir: Path, text: str) -> Path:
    (data_dir / "tinyshakespeare").mkdir()
    (data_dir / "tinyshakespeare" / "input.txt").write_text(text, encoding="utf-8")
    return data_dir


def list_texts(splits: Splits) -> list[str]:
    return [example["text"] for examples in (splits.train, splits.selection, splits.test) for example in examples]


def test_a_text_task_has_one_example_a_split_from_a_file_each(tmp_path: Path) -> None:
    """Lines are examples joined by blank lines, the blank ones empty examples: as in GPTQ, SparseGPT and Wanda."""
    splits = load_splits(WIKITEXT, write_wikitext(tmp_path, test=" \n = Title = \n \n A line .\n"), SMALL)
    assert list_texts(splits) == ["a b\n", "c d\n", "\n\n = Title = \n\n\n\n\n A line .\n"]
    assert splits.shots == ()


def test_the_examples_of_the_hub_and_their_file_have_the_same_text(tmp_path: Path) -> None:
    """wikitext-2-raw-v1 as the Hub has it, a blank line an empty example."""
    examples = ["", " = Robert Boulter = \n", "", " Robert Boulter is an actor . \n", " He had a role . \n", ""]
    file = "".join(example or " \n" for example in examples)
    [example] = load_splits(WIKITEXT, write_wikitext(tmp_path, test=file), SMALL).test
    assert example["text"] == "\n\n".join(examples)


def test_a_text_in_one_file_is_divided_by_its_lines(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(40)]
    splits = load_splits(SHAKESPEARE, write_shakespeare(tmp_path, "".join(lines)), SMALL)
    assert list_texts(splits) == ["".join(lines[:36]), "".join(lines[36:38]), "".join(lines[38:])]


@pytest.mark.parametrize("count", [7, 33, 41, 100])
def test_no_line_of_a_divided_text_is_lost_or_shared(tmp_path: Path, count: int) -> None:
    text = "".join(f"line {i}\n" for i in range(count)) + "and the last"
    if count < 10:
        with pytest.raises(InputError, match=r"input\.txt: a text of tinyshakespeare must not be empty"):
            load_splits(SHAKESPEARE, write_shakespeare(tmp_path, text), SMALL)
    else:
        assert "".join(list_texts(load_splits(SHAKESPEARE, write_shakespeare(tmp_path, text), SMALL))) == text


def test_the_limits_of_a_text_count_windows_not_lines(tmp_path: Path) -> None:
    write_wikitext(tmp_path, train="a\nb\nc\n")
    limited = replace(SMALL, n_train=1, n_test=1, n_selection=1)
    assert load_splits(WIKITEXT, tmp_path, limited) == load_splits(WIKITEXT, tmp_path, SMALL)


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_text_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    write_wikitext(tmp_path, valid=text)
    with pytest.raises(InputError, match=rf"{tmp_path}/wikitext2/valid\.txt: a text of wikitext2 must not be empty"):
        load_splits(WIKITEXT, tmp_path, SMALL)


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"wikitext2 needs the file {tmp_path}/wikitext2/train\.txt, which is missing"
    ):
        load_splits(WIKITEXT, tmp_path, SMALL)


def test_the_synthetic_generator_has_no_text() -> None:
    with pytest.raises(InputError, match=r"the synthetic generator has .*got 'wikitext2'"):
        load_splits(WIKITEXT, None, SMALL)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_long_line_in_two_texts_is_a_leak(tmp_path: Path, split: str) -> None:
    line = "x" * LEAK_CHARACTERS
    write_wikitext(tmp_path, test=f"e\n{line}\n", **{split: f"{line}\nf\n"})
    with pytest.raises(
        InputError, match=r"no example of wikitext2 may be in two splits, got one in \w+ and test: 'xxx"
    ):
        load_splits(WIKITEXT, tmp_path, SMALL)


def test_a_short_line_in_two_texts_is_none(tmp_path: Path) -> None:
    """Headings and exclamations recur in every part of a text."""
    line = "x" * (LEAK_CHARACTERS - 1) + "\n"
    load_splits(WIKITEXT, write_wikitext(tmp_path, train=line, valid=line, test=line), SMALL)
