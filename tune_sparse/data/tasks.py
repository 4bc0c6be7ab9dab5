"""The tasks: one table entry each. Prompts and metrics follow EleutherAI's lm-evaluation-harness 0.4.13."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tune_sparse.data.task_types import AnswerTask, ChoiceTask, Example, Hub, Pair, Task, TextTask
from tune_sparse.errors import InputError, unknown_name


def task_named(name: str) -> Task:
    """The task called `name`, or an `InputError` with the closest names."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


def tasks_named(names: str) -> tuple[Task, ...]:
    """The tasks of a mixture such as `gsm8k+mawps+svamp`, or the one task called so."""
    parts = names.split("+")
    if len(set(parts)) < len(parts):
        raise InputError(f"a mixture names each task once, got {names!r}. Remove the repeats.")
    tasks = tuple(task_named(name) for name in parts)
    texts = [task.name for task in tasks if isinstance(task, TextTask)]
    if texts and len(tasks) > 1:
        raise InputError(f"a mixture is of tasks with answers, got the text {texts[0]!r}. Ask for it alone.")
    return tasks


def mean_chance(tasks: Sequence[Task]) -> float | None:
    """Accuracy of guessing, over the tasks of a mixture; None for a text."""
    chances = [task.chance for task in tasks if task.chance is not None]
    return sum(chances) / len(chances) if chances else None


def _hellaswag_text(text: str) -> str:
    """Brackets are artefacts of the WikiHow part of HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag_pairs(example: Example) -> list[Pair]:
    context = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
    return [(_hellaswag_text(context), " " + _hellaswag_text(ending)) for ending in example["endings"]]


def _hellaswag_source(example: Example) -> str:
    """ActivityNet or WikiHow, of activities that are in the training split or not; the two fields may be absent."""
    return f"{str(example.get('source_id', '')).partition('~')[0]} {example.get('split_type', '')}"


def _labelled_choices(context: str, example: Example) -> list[Pair]:
    return [(context, " " + text) for text in example["choices"]["text"]]


def _labelled_gold(example: Example) -> int:
    return example["choices"]["label"].index(example["answerKey"].strip())


def _winogrande_pairs(example: Example) -> list[Pair]:
    """The option is filled into the context; what follows it is scored (partial evaluation)."""
    before, after = example["sentence"].split("_", 1)
    return [(before + example[option], " " + after.strip()) for option in ("option1", "option2")]


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


def _gsm8k_extract_flexibly(text: str) -> str | None:
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return _plain_number(found[-1][0] or found[-1][1]) if found else None


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


def _wikitext_joined(lines: list[str]) -> str:
    """Rows of the Hub's dataset (blank ones empty), joined as in the pruning literature (GPTQ, SparseGPT, Wanda)."""
    return "\n\n".join(line if line.strip() else "" for line in lines)


def _alpaca(instruction: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{instruction}\n\n### Response:"
    )


def _arc(name: str, config: str, about: str) -> Task:
    return ChoiceTask(
        name=name,
        about=about,
        fields={"question": str, "choices": dict, "answerKey": str},
        test_split="test",
        hub=Hub("allenai/ai2_arc", config),
        chance=0.25,
        pairs=lambda example: _labelled_choices(f"Question: {example['question']}\nAnswer:", example),
        gold=_labelled_gold,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ChoiceTask(
            name="boolq",
            about="yes/no questions about a passage",
            fields={"question": str, "passage": str, "answer": bool},
            test_split="validation",
            hub=Hub("google/boolq"),
            chance=0.5,
            pairs=lambda example: [
                (f"{example['passage']}\nQuestion: {example['question']}?\nAnswer:", choice)
                for choice in (" no", " yes")
            ],
            gold=lambda example: int(example["answer"]),
            has_normalised_accuracy=False,
            yes=1,
        ),
        ChoiceTask(
            name="hellaswag",
            about="the likeliest continuation of a scene, of 4",
            fields={"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)},
            test_split="validation",
            hub=Hub("Rowan/hellaswag"),
            chance=0.25,
            source=_hellaswag_source,
            pairs=_hellaswag_pairs,
            gold=lambda example: int(example["label"]),
        ),
        AnswerTask(
            name="gsm8k",
            about="grade-school mathematics, answered in steps",
            fields={"question": str, "answer": str},
            test_split="test",
            hub=Hub("openai/gsm8k", "main"),
            chance=0.0,
            num_fewshot=5,
            pair=lambda example: (f"Question: {example['question']}\nAnswer:", " " + example["answer"]),
            gold=lambda example: _number_after_hashes(example["answer"]),
            extract=_gsm8k_extract,
            extract_flexibly=_gsm8k_extract_flexibly,
            until=("Question:", "</s>", "<|im_end|>"),
        ),
        AnswerTask(
            name="mawps",
            about="arithmetic word problems",
            fields={"original_text": str, "ans": (int, float)},
            test_split="test",
            hub=None,
            chance=0.0,
            pair=lambda example: (_alpaca(example["original_text"]), f" {_number_text(example['ans'])}"),
            gold=lambda example: _number_text(example["ans"]),
            extract=_last_number,
            equal=_numbers_close,
            until=("### Instruction",),
        ),
        AnswerTask(
            name="svamp",
            about="arithmetic word problems with variations",
            fields={"Body": str, "Question": str, "Answer": str},
            test_split="test",
            hub=Hub("ChilleD/SVAMP"),
            chance=0.0,
            pair=lambda example: (
                _alpaca(f"{example['Body']} {example['Question']}"),
                f" {_number_text(float(example['Answer']))}",
            ),
            gold=lambda example: _number_text(float(example["Answer"])),
            extract=_last_number,
            equal=_numbers_close,
            until=("### Instruction",),
        ),
        ChoiceTask(
            name="piqa",
            about="everyday physics, 2 choices",
            fields={"goal": str, "sol1": str, "sol2": str, "label": int},
            test_split="validation",
            hub=Hub("baber/piqa"),
            chance=0.5,
            pairs=lambda example: [
                (f"Question: {example['goal']}\nAnswer:", " " + example[solution]) for solution in ("sol1", "sol2")
            ],
            gold=lambda example: example["label"],
        ),
        ChoiceTask(
            name="winogrande",
            about="which of 2 words fits a gap",
            fields={"sentence": str, "option1": str, "option2": str, "answer": str},
            test_split="validation",
            hub=Hub("allenai/winogrande", "winogrande_xl"),
            chance=0.5,
            pairs=_winogrande_pairs,
            gold=lambda example: int(example["answer"]) - 1,
            has_normalised_accuracy=False,
        ),
        ChoiceTask(
            name="openbookqa",
            about="elementary science, 4 choices",
            fields={"question_stem": str, "choices": dict, "answerKey": str},
            test_split="test",
            hub=Hub("allenai/openbookqa", "main"),
            chance=0.25,
            pairs=lambda example: _labelled_choices(example["question_stem"], example),
            gold=_labelled_gold,
        ),
        _arc("arc_easy", "ARC-Easy", "school science, easy questions, 4 choices"),
        _arc("arc_challenge", "ARC-Challenge", "school science, hard questions, 4 choices"),
        TextTask(
            name="wikitext2",
            about="articles of Wikipedia",
            test_split="test",
            hub=Hub("Salesforce/wikitext", "wikitext-2-raw-v1"),
            files={"train": "train.txt", "validation": "valid.txt", "test": "test.txt"},
            joined=_wikitext_joined,
        ),
        TextTask(
            name="tinyshakespeare",
            about="plays of Shakespeare",
            test_split="test",
            hub=None,
            files=dict.fromkeys(("train", "validation", "test"), "input.txt"),
            parts={"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)},
        ),
    )
}
