"""The tasks: one table entry each. Prompts and metrics follow EleutherAI's lm-evaluation-harness 0.4.13."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tune_sparse.data.task_types import AnswerTask, ChoiceTask, Example, Hub, Pair, Task, TextTask
from tune_sparse.errors import InputError, unknown_name

EXAMPLE = "hellaswag=acc"
"""A choice of a primary metric, for helps and errors."""


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


def chosen_metrics(texts: Sequence[str]) -> dict[str, str]:
    """{task: primary metric} of texts such as `hellaswag=acc`.

    Raises `InputError` for an unknown task, with the closest names, and for a metric that a task has not.
    """
    chosen: dict[str, str] = {}
    for text in texts:
        name, _, metric = text.partition("=")
        if not metric:
            raise InputError(f"a primary metric is given as TASK=METRIC, got {text!r}. Write for example {EXAMPLE}.")
        if metric not in task_named(name).metrics:
            raise unknown_name(f"metric of {name}", metric, TASKS[name].metrics)
        if chosen.setdefault(name, metric) != metric:
            raise InputError(f"a task has one primary metric, {name} got {chosen[name]} and {metric}. Give one.")
    return chosen


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


def _arc(name: str, config: str, about: str, test_examples: int, primary_metric: str, why_primary: str) -> Task:
    return ChoiceTask(
        name=name,
        about=about,
        primary_metric=primary_metric,
        why_primary=why_primary,
        fields={"question": str, "choices": dict, "answerKey": str},
        test_split="test",
        hub=Hub("allenai/ai2_arc", config),
        test_examples=test_examples,
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
            test_examples=3270,
            chance=0.5,
            pairs=lambda example: [
                (f"{example['passage']}\nQuestion: {example['question']}?\nAnswer:", choice)
                for choice in (" no", " yes")
            ],
            gold=lambda example: int(example["answer"]),
            has_normalised_accuracy=False,
            yes=1,
            primary_metric="acc",
            why_primary="both answers are one word, and all sources print it",
        ),
        ChoiceTask(
            name="hellaswag",
            about="the likeliest continuation of a scene, of 4",
            fields={"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)},
            test_split="validation",
            hub=Hub("Rowan/hellaswag"),
            test_examples=10_042,
            chance=0.25,
            source=_hellaswag_source,
            pairs=_hellaswag_pairs,
            primary_metric="acc_norm",
            why_primary="the endings differ in length, so that acc prefers the short ones; model cards and "
            "leaderboards print it, pruning papers print acc",
            gold=lambda example: int(example["label"]),
        ),
        AnswerTask(
            name="gsm8k",
            about="grade-school mathematics, answered in steps",
            fields={"question": str, "answer": str},
            test_split="test",
            hub=Hub("openai/gsm8k", "main"),
            test_examples=1319,
            chance=0.0,
            num_fewshot=5,
            pair=lambda example: (f"Question: {example['question']}\nAnswer:", " " + example["answer"]),
            gold=lambda example: _number_after_hashes(example["answer"]),
            extractors={"exact_match_strict": _gsm8k_extract, "exact_match_flexible": _gsm8k_extract_flexibly},
            primary_metric="exact_match_strict",
            why_primary="training teaches #### before the answer, and the last number of a text may be any; a base "
            "model before tuning writes no ####, so that only exact_match_flexible says what it knew",
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
            extractors={"exact_match_flexible": _last_number},
            equal=_numbers_close,
            primary_metric="exact_match_flexible",
            why_primary="the last number is the answer in the papers that use this task",
            until=("### Instruction",),
        ),
        AnswerTask(
            name="svamp",
            about="arithmetic word problems with variations",
            fields={"Body": str, "Question": str, "Answer": str},
            test_split="test",
            hub=Hub("ChilleD/SVAMP"),
            test_examples=300,
            chance=0.0,
            pair=lambda example: (
                _alpaca(f"{example['Body']} {example['Question']}"),
                f" {_number_text(float(example['Answer']))}",
            ),
            gold=lambda example: _number_text(float(example["Answer"])),
            extractors={"exact_match_flexible": _last_number},
            equal=_numbers_close,
            primary_metric="exact_match_flexible",
            why_primary="the last number is the answer in the papers that use this task",
            until=("### Instruction",),
        ),
        ChoiceTask(
            name="piqa",
            about="everyday physics, 2 choices",
            fields={"goal": str, "sol1": str, "sol2": str, "label": int},
            test_split="validation",
            hub=Hub("baber/piqa"),
            test_examples=1838,
            chance=0.5,
            pairs=lambda example: [
                (f"Question: {example['goal']}\nAnswer:", " " + example[solution]) for solution in ("sol1", "sol2")
            ],
            primary_metric="acc",
            why_primary="the two solutions are nearly as long, so that the metrics hardly differ, and pruning papers "
            "print it",
            gold=lambda example: example["label"],
        ),
        ChoiceTask(
            name="winogrande",
            about="which of 2 words fits a gap",
            fields={"sentence": str, "option1": str, "option2": str, "answer": str},
            test_split="validation",
            hub=Hub("allenai/winogrande", "winogrande_xl"),
            test_examples=1267,
            chance=0.5,
            pairs=_winogrande_pairs,
            primary_metric="acc",
            why_primary="both choices end in the same words, and all sources print it",
            gold=lambda example: int(example["answer"]) - 1,
            has_normalised_accuracy=False,
        ),
        ChoiceTask(
            name="openbookqa",
            about="elementary science, 4 choices",
            fields={"question_stem": str, "choices": dict, "answerKey": str},
            test_split="test",
            hub=Hub("allenai/openbookqa", "main"),
            test_examples=500,
            chance=0.25,
            pairs=lambda example: _labelled_choices(example["question_stem"], example),
            primary_metric="acc_norm",
            why_primary="the choices are phrases of one word to a dozen, so that acc prefers the short ones; pruning "
            "papers print acc",
            gold=_labelled_gold,
        ),
        _arc(
            "arc_easy",
            "ARC-Easy",
            "school science, easy questions, 4 choices",
            2376,
            "acc",
            "tables of base models and of pruning print it, and dividing by length makes these short answers worse",
        ),
        _arc(
            "arc_challenge",
            "ARC-Challenge",
            "school science, hard questions, 4 choices",
            1172,
            "acc_norm",
            "the choices differ in length, and model cards and leaderboards print it",
        ),
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
