from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tune_sparse.data.task_types import AnswerTask, ChoiceTask, Example, PromptTask, Task, TextTask
from tune_sparse.errors import InputError

COLOURS = ChoiceTask(
    name="colours",
    fields={"question": str, "options": list, "label": int},
    test_split="test",
    hub=None,
    chance=0.5,
    pairs=lambda example: [(example["question"], f" {option}") for option in example["options"]],
    gold=lambda example: example["label"],
    primary_metric="acc_norm",
    why_primary="colours differ in length",
)
SUMS = AnswerTask(
    name="sums",
    fields={"sum": str, "value": (int, float)},
    test_split="test",
    hub=None,
    chance=0.0,
    pair=lambda example: (example["sum"], f" {example['value']}"),
    gold=lambda example: str(example["value"]),
    extractors={"exact_match_flexible": str.strip},
    primary_metric="exact_match_flexible",
    why_primary="there is no other",
    until=("\n",),
)
TEXT = TextTask(name="text", test_split="test", hub=None, files={"test": "test.txt"})

COLOUR = {"question": "Grass is", "options": ["red", "green"], "label": 1}
SUM = {"sum": "1 + 1 =", "value": 2}


def test_a_choice_task_teaches_the_right_choice() -> None:
    assert COLOURS.training_pair(COLOUR) == ("Grass is", " green")
    assert COLOURS.metrics == ("acc", "acc_norm")
    assert replace(COLOURS, has_normalised_accuracy=False).metrics == ("acc",)
    assert COLOURS.yes is None


def test_an_answer_task_teaches_the_worked_answer() -> None:
    assert SUMS.training_pair(SUM) == ("1 + 1 =", " 2")
    assert SUMS.equal("2", "2")
    assert not SUMS.equal("2", "2.0")
    assert SUMS.metrics == ("exact_match_flexible",)


@pytest.mark.parametrize(
    ("task", "example"), [(COLOURS, COLOUR), (SUMS, SUM), (SUMS, SUM | {"value": 2.5}), (TEXT, {"text": "a word"})]
)
def test_a_sound_example_passes(task: Task, example: Example) -> None:
    task.check(example)
    task.check(dict(example) | {"unknown": "fields are let be"})


ANSWER_APART: list[tuple[PromptTask, dict[str, Any], dict[str, Any]]] = [
    (COLOURS, COLOUR, {"label": 0}),
    (SUMS, SUM, {"value": 3}),
]
ASKED_ANEW: list[tuple[PromptTask, dict[str, Any], dict[str, Any]]] = [
    (COLOURS, COLOUR, {"question": "Snow is"}),
    (COLOURS, COLOUR, {"options": ["green", "red"]}),
    (COLOURS, COLOUR, {"options": ["red", "green", "blue"]}),
    (SUMS, SUM, {"sum": "1 + 2 ="}),
]


@pytest.mark.parametrize(("task", "example", "change"), ANSWER_APART)
def test_what_is_right_is_no_part_of_what_is_asked(task: PromptTask, example: Example, change: Example) -> None:
    other = {**example, **change}
    assert task.question(example) == task.question(other)
    assert task.question_id(example) == task.question_id(other)


@pytest.mark.parametrize(("task", "example", "change"), ASKED_ANEW)
def test_another_question_or_other_choices_are_another_example(
    task: PromptTask, example: Example, change: Example
) -> None:
    other = {**example, **change}
    assert task.question(example) != task.question(other)
    assert task.question_id(example) != task.question_id(other)


def test_an_id_does_not_run_texts_together() -> None:
    one, other = ({"question": "", "options": options, "label": 0} for options in (["a b", "c"], ["a", "b c"]))
    assert COLOURS.question_id(one) != COLOURS.question_id(other)


def test_an_id_is_the_same_in_every_run() -> None:
    """SHA-256 of "1 + 1 =", its first 16 digits: files of old runs are paired by it."""
    assert SUMS.question_id(SUM) == "1576caf2566635c8"


@pytest.mark.parametrize("value", [[], "text", 5, None])
def test_an_example_that_is_not_an_object_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"an example of colours must be an object with question, options, label, got"):
        COLOURS.check(value)


@pytest.mark.parametrize(
    ("task", "example", "message"),
    [
        (COLOURS, {}, "an example of colours needs the field 'question', got no field"),
        (COLOURS, {"question": "Grass is"}, "an example of colours needs the field 'options', got question"),
        (COLOURS, COLOUR | {"label": "1"}, "the field 'label' of colours must be int, got '1'"),
        (COLOURS, COLOUR | {"label": True}, "the field 'label' of colours must be int, got True"),
        (SUMS, SUM | {"value": "2"}, "the field 'value' of sums must be int or float, got '2'"),
        (SUMS, SUM | {"value": None}, "the field 'value' of sums must be int or float, got None"),
        (TEXT, {"text": 5}, "the field 'text' of text must be str, got 5"),
        (COLOURS, COLOUR | {"label": 2}, r"the label of colours must be one of its 2 choices, got 2"),
        (COLOURS, COLOUR | {"label": -1}, r"the label of colours must be one of its 2 choices, got -1"),
        (COLOURS, COLOUR | {"options": []}, r"the label of colours must be one of its 0 choices, got 1"),
        (
            COLOURS,
            COLOUR | {"options": ["red", "green", " \n"]},
            r"a choice of colours must have a question and a text, choice 2 is \('Grass is', '  \\n'\)",
        ),
        (COLOURS, COLOUR | {"options": ["", "green"]}, "a choice of colours must have a question and a text, choice 0"),
        (COLOURS, COLOUR | {"question": "  "}, "a choice of colours must have a question and a text, choice 0 is"),
        (SUMS, SUM | {"sum": " "}, "a question of sums must have a text, got ' '"),
        (TEXT, {"text": " \n\n"}, r"a text of text must not be empty, got ' \\n\\n'"),
    ],
)
def test_a_bad_example_is_refused_with_the_rule_and_the_value(task: Task, example: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        task.check(example)


@pytest.mark.parametrize("error", [KeyError("label"), ValueError("no"), TypeError("no"), AttributeError("no")])
def test_a_label_that_cannot_be_read_is_refused(error: Exception) -> None:
    def gold(example: Example) -> int:
        raise error

    broken = replace(COLOURS, name="b", fields={}, gold=gold)
    with pytest.raises(InputError, match="an example of b has a label or choices that cannot be read"):
        broken.check(COLOUR)


@pytest.mark.parametrize("kind", [Task, PromptTask])
def test_a_task_is_of_one_of_the_three_kinds(kind: type[Task]) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind(name="t", fields={}, test_split="test", hub=None, chance=0.5)
