"""Rows and tokens: where the rows of a task come from, how they are split, how they are encoded."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.config import Protocol
from tune_sparse.errors import InputError
from tune_sparse.tasks import Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT_SEED = 0
"""Of the selection rows carved from train. Not the seed of a cell: all cells are compared on the same rows."""


@dataclass(frozen=True)
class Splits:
    """Rows to learn from, to select by, and to be scored on. No prompt is in two of them."""

    train: tuple[Row, ...]
    selection: tuple[Row, ...]
    test: tuple[Row, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every row in order: part of a run's identity."""
        text = json.dumps([self.train, self.selection, self.test], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_splits(task: Task, data_dir: Path | None, protocol: Protocol) -> Splits:
    """The splits of a task by the rule of the study.

    test: the labelled test split, or the official validation split where the test labels are not public (its
    first `n_test` rows). selection: the validation split if it is not the test, else carved from train by a seed.

    Raises `InputError` for a missing file, a malformed row (file and line), or a prompt that two splits share.
    """
    train = read_split(task, "train", data_dir)
    test = read_split(task, task.test_split, data_dir)[: protocol.n_test]
    random.Random(SPLIT_SEED).shuffle(train)
    if task.test_split == "test" and has_split(task, "validation", data_dir):
        selection = read_split(task, "validation", data_dir)[: protocol.n_selection]
    else:
        carved = protocol.n_selection or max(1, len(train) // 10)
        if carved >= len(train):
            raise InputError(
                f"n_selection must leave rows to train on: {task.name} has {len(train)} training rows, got {carved}. "
                "Lower n_selection."
            )
        selection, asked = train[:carved], {asked_by(task, row) for row in train[:carved]}
        train = [row for row in train[carved:] if asked_by(task, row) not in asked]
    splits = Splits(tuple(train[: protocol.n_train]), tuple(selection), tuple(test))
    _refuse_leaks(task, splits)
    return splits


def split_path(task: Task, split: str, data_dir: Path) -> Path:
    return data_dir / task.name / f"{split}.jsonl"


def has_split(task: Task, split: str, data_dir: Path | None) -> bool:
    return data_dir is not None and split_path(task, split, data_dir).exists()


def read_split(task: Task, split: str, data_dir: Path | None) -> list[Row]:
    """Checked rows of one split, from `data_dir/<task>/<split>.jsonl` or from the embedded generator."""
    if data_dir is not None:
        return read_rows(task, split_path(task, split, data_dir))
    from tune_sparse.embedded import EMBEDDED_TASKS, embedded_rows

    if task.name not in EMBEDDED_TASKS:
        raise InputError(
            f"the embedded generator has {', '.join(EMBEDDED_TASKS)}, got {task.name!r}. "
            "Give --data-dir with the rows of this task."
        )
    return embedded_rows(task.name, split)


def read_rows(task: Task, path: Path) -> list[Row]:
    """The rows of a JSON-lines file, each checked; an `InputError` names file and line."""
    if not path.is_file():
        raise InputError(f"{task.name} needs the file {path}, which is missing. Add it, or mend --data-dir.")
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text: {error}. Save it as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            task.check(row)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: each line must be a JSON object: {error}. Mend the line.") from error
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}. Mend the row.") from error
        rows.append(row)
    if not rows:
        raise InputError(f"{path} must have at least one row, got an empty file. Add rows.")
    return rows


def calibration_text(name: str, data_dir: Path | None) -> str:
    """The training text `name` that scores are calibrated on, from `data_dir/<name>/train.txt`."""
    if data_dir is None:
        raise InputError(f"the calibration text {name} comes from a folder, got generated rows. Give --data-dir.")
    path = data_dir / name / "train.txt"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"calibration needs the UTF-8 text {path}: {error}. Add it, or mend --data-dir.") from error


def asked_by(task: Task, row: Row) -> tuple[tuple[str, ...], ...]:
    """What a row asks: the prompt, and the choices where there are any. Two rows that ask the same are the same."""
    return tuple(pair[:1] if task.kind == "generate" else pair for pair in task.pairs(row))


def _refuse_leaks(task: Task, splits: Splits) -> None:
    seen: dict[Any, str] = {}
    for split in ("test", "selection", "train"):
        asked = {asked_by(task, row) for row in getattr(splits, split)}
        for question in asked & seen.keys():
            raise InputError(
                f"no row of {task.name} may be in two splits, got one in {split} and {seen[question]}: "
                f"{question[0][0][-120:]!r}. Remove it from one of them."
            )
        seen |= dict.fromkeys(asked, split)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a context and of what follows it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: bool = False


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_tokens: int
) -> list[Encoded]:
    """Each (context, continuation) as tokens, split where lm-evaluation-harness splits them.

    The pair is encoded as one text; spaces at the end of the context belong to the continuation. A pair longer
    than `max_tokens` loses the start of its context.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + rest) for context, rest in pairs]
    contexts = tokenizer([context for context, _ in moved])["input_ids"]
    wholes = tokenizer([context + rest for context, rest in moved])["input_ids"]
    return [_cut(context, whole, max_tokens) for context, whole in zip(contexts, wholes, strict=True)]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int) -> list[Encoded]:
    """Each prompt as a context, its last `max_tokens` tokens."""
    wholes = tokenizer(list(prompts))["input_ids"]
    return [Encoded(tuple(ids[-max_tokens:]), (), len(ids) > max_tokens) for ids in wholes]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_tokens: int
) -> list[Encoded]:
    """As `encode_pairs`, each continuation an answer to learn: closed by the end-of-text token."""
    end = (tokenizer.eos_token_id,)
    return [replace(e, continuation=e.continuation + end) for e in encode_pairs(tokenizer, pairs, max_tokens - 1)]


def _cut(context: list[int], whole: list[int], max_tokens: int) -> Encoded:
    continuation = whole[len(context) :]
    excess = max(0, len(context) + len(continuation) - max_tokens)
    kept = max(0, excess - len(context))
    return Encoded(tuple(context[excess:]), tuple(continuation[kept:]), excess > 0)
