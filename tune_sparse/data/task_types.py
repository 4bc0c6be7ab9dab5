"""Tasks: one benchmark each, as it is read, asked and scored.

A task turns source examples (the schema of its Hugging Face dataset) into what a model reads and what is right. There
are three kinds:

- `ChoiceTask`: pairs (context, continuation), of which one is right;
- `AnswerTask`: a prompt whose greedy continuation is compared with the gold answer;
- `TextTask`: a text whose perplexity is measured.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tune_sparse.errors import InputError

Example = Mapping[str, Any]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Hub:
    """The place of a task's examples on the Hugging Face Hub."""

    path: str
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One benchmark, as it is read, asked and scored."""

    name: str
    about: str = ""
    """For a help."""
    fields: Mapping[str, type | tuple[type, ...]]
    """Source fields that an example must have, with their types."""
    test_split: Literal["validation", "test"]
    """The labelled split that is scored; selection examples never come from it."""
    hub: Hub | None
    """None where the Hub has no dataset with these fields and splits."""
    chance: float | None
    """Accuracy of guessing; None where accuracy is not the metric."""
    num_fewshot: int = 0
    """Worked examples in a test prompt of the harness."""
    source: Callable[[Example], str] = lambda example: ""
    """Names the source that an example comes from: where some of a split are drawn, each source has its share."""
    prompt_version: int = 1
    """Raised when a prompt or metric changes: part of a run's identity."""

    def check(self, example: Any) -> None:
        """Raise `InputError` unless `example` has the fields, types and label range of this task."""
        if not isinstance(example, dict):
            raise InputError(
                f"an example of {self.name} must be an object with {', '.join(self.fields)}, got {example!r}"
            )
        for name, kind in self.fields.items():
            if name not in example:
                raise InputError(
                    f"an example of {self.name} needs the field {name!r}, got {', '.join(example) or 'no field'}"
                )
            if not isinstance(example[name], kind) or (isinstance(example[name], bool) and kind is not bool):
                wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise InputError(f"the field {name!r} of {self.name} must be {wanted}, got {example[name]!r}")
        try:
            self._check_values(example)
        except InputError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"an example of {self.name} has a label or choices that cannot be read: {error}"
            ) from error

    @abstractmethod
    def _check_values(self, example: Example) -> None: ...


@dataclass(frozen=True, kw_only=True)
class PromptTask(Task):
    """A task whose examples are questions with a right answer."""

    chance: float
    gold: Callable[[Example], Any]
    """choice: index of the right pair. answer: the final answer as text."""

    @abstractmethod
    def training_pair(self, example: Example) -> Pair:
        """The prompt and the answer to learn."""

    @abstractmethod
    def question(self, example: Example) -> tuple[str, ...]:
        """The question of an example, without its answer: two examples that ask the same are the same."""

    def question_id(self, example: Example) -> str:
        """Names what an example asks in every run and file."""
        return hashlib.sha256("\0".join(self.question(example)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(PromptTask):
    """The continuation with the highest log-likelihood is the prediction."""

    pairs: Callable[[Example], list[Pair]]
    """(context, continuation) of each choice; a continuation begins with the space that divides the two."""
    has_normalised_accuracy: bool = True
    """True if the harness also divides log-likelihoods by the continuations' lengths in characters."""
    yes: int | None = None
    """yes/no tasks: the index that counts as positive for F1."""

    def training_pair(self, example: Example) -> Pair:
        return self.pairs(example)[self.gold(example)]

    def question(self, example: Example) -> tuple[str, ...]:
        return tuple("".join(pair) for pair in self.pairs(example))

    def _check_values(self, example: Example) -> None:
        pairs, gold = self.pairs(example), self.gold(example)
        if not 0 <= gold < len(pairs):
            raise InputError(f"the label of {self.name} must be one of its {len(pairs)} choices, got {gold}")
        for number, pair in enumerate(pairs):
            if not all(part.strip() for part in pair):
                raise InputError(f"a choice of {self.name} must have a question and a text, choice {number} is {pair}")


@dataclass(frozen=True, kw_only=True)
class AnswerTask(PromptTask):
    """The final answer in the greedy continuation of a prompt is the prediction."""

    pair: Callable[[Example], Pair]
    """The prompt and its worked answer."""
    extract: Callable[[str], str | None]
    """The final answer found in a generated text, or None."""
    extract_flexibly: Callable[[str], str | None] | None = None
    """A second, more lenient reading, where the harness has one."""
    equal: Callable[[str, str], bool] = str.__eq__
    """True if an extracted answer and the gold answer agree."""
    until: tuple[str, ...]
    """Texts that end an answer."""

    def training_pair(self, example: Example) -> Pair:
        return self.pair(example)

    def question(self, example: Example) -> tuple[str, ...]:
        return (self.pair(example)[0],)

    def _check_values(self, example: Example) -> None:
        prompt, _ = self.pair(example)
        self.gold(example)
        if not prompt.strip():
            raise InputError(f"a question of {self.name} must have a text, got {prompt!r}")


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A text, scored by its perplexity. Its only example has the whole text of a split."""

    chance: None = None
    fields: Mapping[str, type | tuple[type, ...]] = field(default_factory=lambda: {"text": str})
    files: Mapping[str, str]
    """{split: file}, plain text."""
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """For splits that share a file: first and last line of each, as fractions of the file."""
    joined: Callable[[list[str]], str] = "".join
    """The text that is scored, made of the file's lines with their line ends."""

    def _check_values(self, example: Example) -> None:
        if not example["text"].strip():
            raise InputError(f"a text of {self.name} must not be empty, got {example['text'][:20]!r}")
