"""The examples that a sweep needs, read and checked once, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from tune_sparse.config import Protocol, SweepConfig
from tune_sparse.data.sources import examples_folder
from tune_sparse.data.splits import Splits, calibration_text, fingerprint_splits, load_splits
from tune_sparse.data.task_types import AnswerTask, ChoiceTask, Example, PromptTask, Task, TextTask
from tune_sparse.data.tasks import tasks_named
from tune_sparse.evaluation.seconds import TaskSizes
from tune_sparse.identity import hash_json
from tune_sparse.pruning.methods import METHODS

CHARACTERS = 4.0
"""Of a token of English, assumed."""
SAMPLE = 200
"""Examples whose length is looked at."""


@dataclass(frozen=True)
class ExampleCounts:
    """How many examples a task, or a mixture, has for each purpose. A text is one example."""

    training: int
    selection: int
    test: int

    @classmethod
    def of_splits(cls, splits: Sequence[Splits]) -> ExampleCounts:
        """splits: those of each task"""
        return cls(*(sum(len(getattr(split, name)) for split in splits) for name in ("train", "selection", "test")))

    def text(self) -> str:
        return f"{self.training} training, {self.selection} selection and {self.test} test examples"


@dataclass(frozen=True)
class Examples:
    """A plan needs no more of them: trials read their own, and compare the fingerprints."""

    data_dir: Path | None
    """None for synthetic ones"""
    fingerprints: dict[str, str]
    """{task or mixture: SHA-256 of its splits}"""
    counts: dict[str, ExampleCounts]
    """{task or mixture: how many}"""
    calibration_text: str | None
    """that scores are calibrated on; None where they are calibrated on tasks, or not at all"""
    sizes: Mapping[str, TaskSizes] = field(default_factory=dict)
    """{task or mixture: how much there is}, its tokens guessed from characters"""

    @property
    def calibration_fingerprint(self) -> str | None:
        return None if self.calibration_text is None else hash_json(self.calibration_text)


def read_examples(config: SweepConfig) -> Examples:
    """Read every example of a sweep once. Raises `InputError` for one that is wrong, or where there are too few."""
    texts = {protocol.calibration for protocol in config.protocols if is_calibrated(config)} - {"task"}
    text = max(texts, default=None)
    data_dir = examples_folder(config.data_dir, [*config.tasks, *([text] if text else [])])
    tasks = {task.name: task for name in config.tasks for task in tasks_named(name)}
    loaded = {name: load_splits(task, data_dir, config.protocol) for name, task in tasks.items()}
    splits = {name: [loaded[task.name] for task in tasks_named(name)] for name in config.tasks}
    return Examples(
        data_dir,
        {name: fingerprint_splits(found) for name, found in splits.items()},
        {name: ExampleCounts.of_splits(found) for name, found in splits.items()},
        _text(text, loaded, data_dir) if text else None,
        {name: _sizes(tasks_named(name), found, config.protocol) for name, found in splits.items()},
    )


def _sizes(tasks: Sequence[Task], splits: Sequence[Splits], protocol: Protocol) -> TaskSizes:
    """Of a task, or of a mixture, which is trained on all of its tasks and scored on each."""
    trained, tested = [], []
    for task, split in zip(tasks, splits, strict=True):
        trained += [_tokens(_training_text(task, example), protocol) for example in split.train[:SAMPLE]]
        tested += [_tokens(_test_text(task, example), protocol) for example in split.test[:SAMPLE]]
    count: float = sum(len(split.test) for split in splits)
    if any(isinstance(task, TextTask) for task in tasks):  # windows of a text
        count = sum(len(e["text"]) for split in splits for e in split.test) / CHARACTERS / protocol.max_tokens
    is_generated = any(isinstance(task, AnswerTask) for task in tasks)
    return TaskSizes(fmean(trained), count, fmean(tested), is_generated)


def _tokens(text: str, protocol: Protocol) -> float:
    return min(len(text) / CHARACTERS, protocol.max_tokens)


def _training_text(task: Task, example: Example) -> str:
    return "".join(task.training_pair(example)) if isinstance(task, PromptTask) else str(example["text"])


def _test_text(task: Task, example: Example) -> str:
    """What is computed to score an example: a choice's context once, and each choice."""
    if isinstance(task, ChoiceTask):
        pairs = task.pairs(example)
        return pairs[0][0] + "".join(rest for _, rest in pairs)
    return task.training_pair(example)[0] if isinstance(task, PromptTask) else str(example["text"])


def is_calibrated(config: SweepConfig) -> bool:
    """Whether some of its cells read calibration examples, for their scores or for recovery."""
    is_recovered = any(protocol.recover != "none" for protocol in config.protocols)
    return is_recovered or any(METHODS[method].is_calibrated for method in config.methods)


def _text(name: str, loaded: Mapping[str, Splits], data_dir: Path | None) -> str:
    """The training text of a text task, which may be a task of the sweep as well."""
    return str(loaded[name].train[0]["text"]) if name in loaded else calibration_text(name, data_dir)
