"""The tasks: one table entry each. Prompts follow EleutherAI's lm-evaluation-harness 0.4.13.

A task turns a source row (the schema of its Hugging Face dataset) into what a model reads and what is right:
`choice` tasks into pairs (context, continuation) of which one is right, `generate` tasks into a prompt whose
greedy continuation is compared with the gold answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tune_sparse.errors import InputError, unknown_name

Row = Mapping[str, Any]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """How one benchmark is read, asked and scored."""

    name: str
    kind: Literal["choice", "generate"]
    fields: Mapping[str, type | tuple[type, ...]]
    """Source fields that a row must have, with their types."""
    chance: float
    """Accuracy of guessing."""
    test_split: Literal["validation", "test"]
    """The labelled split that is scored; selection rows never come from it."""
    pairs: Callable[[Row], list[Pair]]
    """choice: (context, continuation) of each choice. generate: the prompt and its worked answer, alone."""
    gold: Callable[[Row], Any]
    """choice: index of the right pair. generate: the final answer as text."""
    extract: Callable[[str], str | None] = lambda text: None
    """generate: the final answer found in a generated text, or None."""
    equal: Callable[[str, str], bool] = str.__eq__
    """generate: whether an extracted answer and the gold answer agree."""
    until: tuple[str, ...] = ()
    """generate: texts that end an answer."""
    prompt_version: int = 1
    """Raised when a prompt or metric changes: part of a run's identity."""

    def training_pair(self, row: Row) -> Pair:
        """The prompt and the answer to learn."""
        pairs = self.pairs(row)
        return pairs[self.gold(row)] if self.kind == "choice" else pairs[0]

    def check(self, row: Any) -> None:
        """Raise `InputError` unless `row` has the fields, types and label range of this task."""
        if not isinstance(row, dict):
            raise InputError(f"a row of {self.name} must be an object with {', '.join(self.fields)}, got {row!r}")
        for name, kind in self.fields.items():
            if name not in row:
                raise InputError(f"a row of {self.name} needs the field {name!r}, got {', '.join(row) or 'no field'}")
            if not isinstance(row[name], kind) or (isinstance(row[name], bool) and kind is not bool):
                wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise InputError(f"the field {name!r} of {self.name} must be {wanted}, got {row[name]!r}")
        try:
            pairs, gold = self.pairs(row), self.gold(row)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"a row of {self.name} has a label or choices that cannot be read: {error}") from error
        if self.kind == "choice" and not 0 <= gold < len(pairs):
            raise InputError(f"the label of {self.name} must be one of its {len(pairs)} choices, got {gold}")


def task_named(name: str) -> Task:
    """The task called `name`, or an `InputError` with the closest names."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


def _hellaswag_text(text: str) -> str:
    """Brackets are artefacts of the WikiHow part of HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag_pairs(row: Row) -> list[Pair]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return [(_hellaswag_text(context), " " + _hellaswag_text(ending)) for ending in row["endings"]]


def _labelled_choices(context: str, row: Row) -> list[Pair]:
    return [(context, " " + text) for text in row["choices"]["text"]]


def _labelled_gold(row: Row) -> int:
    return row["choices"]["label"].index(row["answerKey"].strip())


def _winogrande_pairs(row: Row) -> list[Pair]:
    """The option is filled into the context; what follows it is scored (partial evaluation)."""
    before, after = row["sentence"].split("_", 1)
    return [(before + row[option], " " + after.strip()) for option in ("option1", "option2")]


def _plain_number(text: str) -> str:
    """Without thousands separators, currency signs and the full stop of a sentence."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text)).strip()


def _gsm8k_extract(text: str) -> str | None:
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return _plain_number(found[1]) if found else None


def _number_after_hashes(answer: str) -> str:
    number = _plain_number(answer.split("#### ")[1])
    if not re.fullmatch(r"-?[0-9.]*[0-9]", number):
        raise ValueError(f"the answer must end in #### and a number, got {answer[-20:]!r}")
    return number


def _last_number(text: str) -> str | None:
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return found[-1] if found else None


def _numbers_close(found: str, gold: str) -> bool:
    return abs(float(found) - float(gold)) <= 0.001


def _number_text(value: float) -> str:
    """To the digits that scoring tells apart; never 1.2e+06."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number")
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _alpaca(instruction: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{instruction}\n\n### Response:"
    )


def _arc(name: str) -> Task:
    return Task(
        name=name,
        kind="choice",
        fields={"question": str, "choices": dict, "answerKey": str},
        chance=0.25,
        test_split="test",
        pairs=lambda row: _labelled_choices(f"Question: {row['question']}\nAnswer:", row),
        gold=_labelled_gold,
    )


TASKS = {
    task.name: task
    for task in (
        Task(
            name="boolq",
            kind="choice",
            fields={"question": str, "passage": str, "answer": bool},
            chance=0.5,
            test_split="validation",
            pairs=lambda row: [
                (f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", choice) for choice in (" no", " yes")
            ],
            gold=lambda row: int(row["answer"]),
        ),
        Task(
            name="hellaswag",
            kind="choice",
            fields={"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)},
            chance=0.25,
            test_split="validation",
            pairs=_hellaswag_pairs,
            gold=lambda row: int(row["label"]),
        ),
        Task(
            name="gsm8k",
            kind="generate",
            fields={"question": str, "answer": str},
            chance=0.0,
            test_split="test",
            pairs=lambda row: [(f"Question: {row['question']}\nAnswer:", " " + row["answer"])],
            gold=lambda row: _number_after_hashes(row["answer"]),
            extract=_gsm8k_extract,
            until=("Question:", "</s>", "<|im_end|>"),
        ),
        Task(
            name="mawps",
            kind="generate",
            fields={"original_text": str, "ans": (int, float)},
            chance=0.0,
            test_split="test",
            pairs=lambda row: [(_alpaca(row["original_text"]), f" {_number_text(row['ans'])}")],
            gold=lambda row: _number_text(row["ans"]),
            extract=_last_number,
            equal=_numbers_close,
            until=("### Instruction",),
        ),
        Task(
            name="svamp",
            kind="generate",
            fields={"Body": str, "Question": str, "Answer": str},
            chance=0.0,
            test_split="test",
            pairs=lambda row: [(_alpaca(f"{row['Body']} {row['Question']}"), f" {_number_text(float(row['Answer']))}")],
            gold=lambda row: _number_text(float(row["Answer"])),
            extract=_last_number,
            equal=_numbers_close,
            until=("### Instruction",),
        ),
        Task(
            name="piqa",
            kind="choice",
            fields={"goal": str, "sol1": str, "sol2": str, "label": int},
            chance=0.5,
            test_split="validation",
            pairs=lambda row: [
                (f"Question: {row['goal']}\nAnswer:", " " + row[solution]) for solution in ("sol1", "sol2")
            ],
            gold=lambda row: row["label"],
        ),
        Task(
            name="winogrande",
            kind="choice",
            fields={"sentence": str, "option1": str, "option2": str, "answer": str},
            chance=0.5,
            test_split="validation",
            pairs=_winogrande_pairs,
            gold=lambda row: int(row["answer"]) - 1,
        ),
        Task(
            name="openbookqa",
            kind="choice",
            fields={"question_stem": str, "choices": dict, "answerKey": str},
            chance=0.25,
            test_split="test",
            pairs=lambda row: _labelled_choices(row["question_stem"], row),
            gold=_labelled_gold,
        ),
        _arc("arc_easy"),
        _arc("arc_challenge"),
    )
}
