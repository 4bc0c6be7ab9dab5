"""Examples and tokens: where the examples of a task come from, how they are split, how they are encoded."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.config import Protocol
from tune_sparse.data.draws import drawn
from tune_sparse.data.task_types import Example, Pair, PromptTask, Task, TextTask
from tune_sparse.data.tasks import task_named
from tune_sparse.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT_SEED = 0
"""Seed of the selection examples carved from train. Not a cell's seed: all cells are compared on the same ones."""


@dataclass(frozen=True)
class Splits:
    """Examples to train on, to select by, and to be scored on. No prompt is in two of them.

    selection: examples of no training and no score, for what is chosen by looking: the evaluation loss of a training,
    the candidates of a search. Others call it validation, which is also the name of a split of some data sets.
    """

    train: tuple[Example, ...]
    selection: tuple[Example, ...]
    test: tuple[Example, ...]
    shots: tuple[Example, ...] = ()
    """The pool of few-shot examples: the train split in its own order, if the protocol asks for them."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every example in order: part of a run's identity."""
        parts = [self.train, self.selection, self.test, *([self.shots] if self.shots else [])]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_splits(splits: Sequence[Splits]) -> str:
    """Fingerprint of one task's splits, or of those of a mixture's tasks in order."""
    if len(splits) == 1:
        return splits[0].fingerprint
    return hashlib.sha256("".join(split.fingerprint for split in splits).encode()).hexdigest()


def load_splits(task: Task, data_dir: Path | None, protocol: Protocol) -> Splits:
    """The splits of a task by the rule of the study.

    test: the labelled test split, or the official validation split where the test labels are not public, `n_test` of
    it drawn. selection: drawn from the validation split if that is not the test, else carved from train by a seed.
    The only example of a text task has the whole split; its limits count windows, when it is encoded.

    Raises `InputError` for a missing file, a malformed example (file and line), or a prompt that two splits share.
    """
    if not isinstance(task, PromptTask):
        train, selection, test = (read_split(task, split, data_dir) for split in ("train", "validation", "test"))
        splits = Splits(tuple(train), tuple(selection), tuple(test))
    else:
        splits = _prompt_splits(task, data_dir, protocol)
    _check_disjoint(task, splits)
    return splits


def load_test(task: Task, data_dir: Path | None, protocol: Protocol) -> Splits:
    """Load only what scoring needs: the test examples, and the pool of few-shot examples. Raises as `load_splits`."""
    is_few_shot = protocol.num_fewshot and isinstance(task, PromptTask)
    return _scored_splits(task, data_dir, protocol, read_split(task, "train", data_dir) if is_few_shot else [])


def _scored_splits(task: Task, data_dir: Path | None, protocol: Protocol, train: Sequence[Example]) -> Splits:
    """As `load_test`, with the training examples at hand."""
    test = read_split(task, task.test_split, data_dir)
    if isinstance(task, PromptTask):
        test = draw_examples(task, "test", test, protocol.n_test)
    is_few_shot = protocol.num_fewshot and isinstance(task, PromptTask)
    shots = tuple(train) if is_few_shot else ()
    if is_few_shot and len(shots) <= protocol.num_fewshot:
        raise InputError(
            f"num_fewshot must be less than the {len(shots)} training examples of {task.name}, "
            f"got {protocol.num_fewshot}. Lower it."
        )
    _check_disjoint(task, Splits(shots, (), tuple(test)))
    return Splits((), (), tuple(test), shots)


def _prompt_splits(task: PromptTask, data_dir: Path | None, protocol: Protocol) -> Splits:
    train = read_split(task, "train", data_dir)
    scored = _scored_splits(task, data_dir, protocol, train)
    random.Random(SPLIT_SEED).shuffle(train)
    if task.test_split == "test" and has_split(task, "validation", data_dir):
        validation = read_split(task, "validation", data_dir)
        selection = draw_examples(task, "selection", validation, protocol.n_selection)
    else:
        carved = protocol.n_selection or max(1, len(train) // 10)
        if carved >= len(train):
            raise InputError(
                f"n_selection must leave examples to train on: {task.name} has {len(train)} training examples, "
                f"got {carved}. Lower n_selection."
            )
        selection, questions = train[:carved], {task.question(example) for example in train[:carved]}
        train = [example for example in train[carved:] if task.question(example) not in questions]
    return replace(scored, train=tuple(train[: protocol.n_train]), selection=tuple(selection))


def draw_examples(task: Task, use: str, examples: Sequence[Example], count: int | None) -> list[Example]:
    """Some of the examples in their own order, those of each source in proportion. use: of two draws from one split."""
    return [examples[i] for i in drawn([task.source(example) for example in examples], count, f"{task.name}/{use}")]


def split_path(task: Task, split: str, data_dir: Path) -> Path:
    file = task.files[split] if isinstance(task, TextTask) else f"{split}.jsonl"
    return data_dir / task.name / file


def has_split(task: Task, split: str, data_dir: Path | None) -> bool:
    return data_dir is not None and split_path(task, split, data_dir).exists()


def read_split(task: Task, split: str, data_dir: Path | None) -> list[Example]:
    """Checked examples of one split, from the files in `data_dir/<task>/` or from the synthetic generator."""
    if data_dir is not None:
        path = split_path(task, split, data_dir)
        return read_text(task, split, path) if isinstance(task, TextTask) else read_examples_file(task, path)
    from tune_sparse.data.synthetic import SYNTHETIC_TASKS, synthetic_examples

    if task.name not in SYNTHETIC_TASKS:
        raise InputError(
            f"the synthetic generator has {', '.join(SYNTHETIC_TASKS)}, got {task.name!r}. "
            "Give --data-dir with the examples of this task."
        )
    return synthetic_examples(task.name, split)


def read_examples_file(task: Task, path: Path) -> list[Example]:
    """The examples of a JSON-lines file, each checked; an `InputError` names file and line."""
    examples: list[Example] = []
    for number, line in enumerate(_file_content(task, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            task.check(example)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: each line must be a JSON object: {error}. Fix the line.") from error
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}. Fix the example.") from error
        examples.append(example)
    if not examples:
        raise InputError(f"{path} must have at least one example, got an empty file. Add examples.")
    return examples


def read_text(task: TextTask, split: str, path: Path) -> list[Example]:
    """The text of one split as its only example; an `InputError` names the file."""
    lines = _file_content(task, path).splitlines(keepends=True)
    first, last = task.parts.get(split, (0.0, 1.0))
    example = {"text": task.joined(lines[round(first * len(lines)) : round(last * len(lines))])}
    try:
        task.check(example)
    except InputError as error:
        raise InputError(f"{path}: {error}. Add text.") from error
    return [example]


def _file_content(task: Task, path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{task.name} needs the file {path}, which is missing. Add it, or fix --data-dir.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text: {error}. Save it as UTF-8.") from error


def calibration_text(name: str, data_dir: Path | None) -> str:
    """The training text of the text task `name`, which scores are calibrated on."""
    [example] = read_split(task_named(name), "train", data_dir)
    return str(example["text"])


LEAK_CHARACTERS = 200
"""Two texts that share a line of this length are not disjoint."""


def _questions(task: Task, examples: Sequence[Example]) -> set[Any]:
    """Questions that must not be in two splits, or the long lines of a text."""
    if isinstance(task, PromptTask):
        return {task.question(example) for example in examples}
    return {(line,) for example in examples for line in example["text"].splitlines() if len(line) >= LEAK_CHARACTERS}


def _check_disjoint(task: Task, splits: Splits) -> None:
    seen: dict[Any, str] = {}
    for split in ("test", "selection", "train"):
        questions = _questions(task, getattr(splits, split))
        for question in questions & seen.keys():
            raise InputError(
                f"no example of {task.name} may be in two splits, got one in {split} and {seen[question]}: "
                f"{question[0][-120:]!r}. Remove it from one of them."
            )
        seen |= dict.fromkeys(questions, split)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a context and of what follows it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: bool = False


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], limit: int) -> list[Encoded]:
    """Each (context, continuation) as tokens, split where lm-evaluation-harness splits them.

    The pair is encoded as one text; spaces at the end of the context belong to the continuation. A pair of more than
    `limit` tokens loses its start.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + rest) for context, rest in pairs]
    contexts = _token_ids(tokenizer, [context for context, _ in moved])
    wholes = _token_ids(tokenizer, [context + rest for context, rest in moved])
    return [_cut(context, whole, limit) for context, whole in zip(contexts, wholes, strict=True)]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int) -> list[Encoded]:
    """Each prompt as a context, its last `limit` tokens."""
    wholes = _token_ids(tokenizer, prompts)
    return [Encoded(tuple(ids[-limit:]), (), len(ids) > limit) for ids in wholes]


def encode_answers(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], limit: int) -> list[Encoded]:
    """As `encode_pairs`, each continuation an answer to learn: closed by the end-of-text token."""
    end = (tokenizer.eos_token_id,)
    return [replace(e, continuation=e.continuation + end) for e in encode_pairs(tokenizer, pairs, limit - 1)]


def encode_windows(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> list[Encoded]:
    """The windows of a text, one after the other: every token follows those before it in its window.

    What is left after the last whole window is dropped, as in the pruning literature (GPTQ, SparseGPT, Wanda); a
    text shorter than a window is one window.
    """
    [ids] = _token_ids(tokenizer, [text])
    window = min(window, len(ids))
    starts = range(0, len(ids) - window + 1, window)
    return [Encoded((ids[start],), tuple(ids[start + 1 : start + window])) for start in starts]


def draw_windows(task: Task, use: str, windows: Sequence[Encoded], count: int | None) -> dict[int, Encoded]:
    """{its number in the text: window} of some of a text's windows, spread over it. use: as `draw_examples`."""
    return {number: windows[number] for number in drawn([""] * len(windows), count, f"{task.name}/{use}")}


def encode_training(
    tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], max_tokens: int, count: int | None
) -> list[Encoded]:
    """Examples to learn from: prompts with their answers, or `count` windows of a text."""
    if isinstance(task, PromptTask):
        return encode_answers(tokenizer, [task.training_pair(example) for example in examples], max_tokens)
    windows = [e for example in examples for e in encode_windows(tokenizer, example["text"], max_tokens)]
    return list(draw_windows(task, "training", windows, count).values())


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """With the special tokens that the tokenizer puts by itself. What is too long is cut, and counted, elsewhere."""
    return tokenizer(list(texts), verbose=False)["input_ids"]


def _cut(context: list[int], whole: list[int], limit: int) -> Encoded:
    excess = max(0, len(whole) - limit)
    return Encoded(tuple(context[excess:]), tuple(whole[len(context) :][max(0, excess - len(context)) :]), excess > 0)
