"""Score a model on a task. Every example's outcome is kept; accuracy or perplexity follows from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tune_sparse.config import Protocol
from tune_sparse.data.batching import batches_by_length
from tune_sparse.data.splits import Encoded, draw_windows, encode_pairs, encode_prompts, encode_windows
from tune_sparse.data.task_types import AnswerTask, ChoiceTask, Example, Pair, PromptTask, Task
from tune_sparse.errors import InputError, RunError
from tune_sparse.evaluation.generation import generate
from tune_sparse.evaluation.likelihood import log_likelihoods, question_tokens
from tune_sparse.evaluation.metrics import Metrics, combined, compute_metrics
from tune_sparse.evaluation.outcomes import Outcome
from tune_sparse.training.budgets import CPU_BUDGETS, Budgets

FEW_SHOT_SEED = 1234
"""Seed of the worked examples in a prompt: that of lm-evaluation-harness."""


@dataclass(frozen=True)
class EvalExample:
    """One test example as a model's tokens."""

    id: str
    gold: str | None
    encoded: tuple[Encoded, ...]
    """choice: one pair a choice. answer: the prompt alone, as context. text: one window."""
    lengths: tuple[int, ...] = ()
    """choice: characters of each continuation, without the space before it."""

    @property
    def is_truncated(self) -> bool:
        return any(e.truncated for e in self.encoded)


@dataclass(frozen=True)
class EvalSet:
    """A task's test examples as a model's tokens: encoded once, scored many times."""

    task: Task
    examples: tuple[EvalExample, ...]
    bytes_per_token: float | None = None
    """of a text, under the model's tokenizer"""


def encode_test(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    protocol: Protocol,
    shots: Sequence[Example] = (),
) -> EvalSet:
    """Encode test examples for `score`; `shots` is the pool of the few-shot examples.

    Raises `InputError` for a choice that has no tokens, or more than a model may read.
    """
    if isinstance(task, PromptTask):
        prefixes = few_shot_prefixes(task, examples, shots, protocol.num_fewshot)
        if isinstance(task, ChoiceTask):
            return EvalSet(task, tuple(_encode_choices(tokenizer, task, examples, prefixes, protocol)))
        return EvalSet(task, tuple(_encode_answers(tokenizer, task, examples, prefixes, protocol)))
    pieces = [e for example in examples for e in encode_windows(tokenizer, example["text"], protocol.max_tokens)]
    if not all(e.continuation for e in pieces):
        raise InputError(f"the text of {task.name} must have at least 2 tokens, it has fewer. Give a longer text.")
    chosen = draw_windows(task, "test", pieces, protocol.n_test)
    windows = [EvalExample(f"window {number}", None, (e,)) for number, e in chosen.items()]
    return EvalSet(task, tuple(windows), text_bytes_per_token(tokenizer, examples))


def text_bytes_per_token(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Example]) -> float:
    """Bytes of UTF-8 that a token stands for, over whole texts."""
    tokens = tokenizer([text["text"] for text in texts], verbose=False)["input_ids"]
    return sum(len(text["text"].encode()) for text in texts) / sum(map(len, tokens))


def few_shot_prefixes(task: PromptTask, examples: Sequence[Example], shots: Sequence[Example], count: int) -> list[str]:
    """The worked examples before each example's prompt, drawn as lm-evaluation-harness draws them, in their order.

    Where the scored split is called validation, the harness draws one more, to be able to leave out the example itself.
    """
    rng, prefixes = Random(FEW_SHOT_SEED), []
    for example in examples:
        drawn = rng.sample(shots, count + (task.test_split == "validation")) if count else []
        others = [shot for shot in drawn if shot != example]
        if len(others) < count:
            others = rng.sample([shot for shot in shots if shot != example], count)
        prefixes.append("".join("".join(task.training_pair(shot)) + "\n\n" for shot in others[:count]))
    return prefixes


def _encode_choices(
    tokenizer: PreTrainedTokenizerBase,
    task: ChoiceTask,
    examples: Sequence[Example],
    prefixes: Sequence[str],
    protocol: Protocol,
) -> Iterator[EvalExample]:
    questions = [
        [(prefix + context, rest) for context, rest in task.pairs(example)]
        for example, prefix in zip(examples, prefixes, strict=True)
    ]
    flat: list[Pair] = [pair for pairs in questions for pair in pairs]
    # A model reads all but the last token of a pair.
    encoded = iter(encode_pairs(tokenizer, flat, protocol.max_tokens + 1))
    for example, pairs in zip(examples, questions, strict=True):
        choices = tuple(next(encoded) for _ in pairs)
        for (_, text), choice in zip(pairs, choices, strict=True):
            if not choice.context or not choice.continuation:
                raise InputError(
                    f"a choice must have between 1 and max_tokens = {protocol.max_tokens} tokens, {task.name} has "
                    f"{text[:80]!r}. Raise max_tokens, or fix the example."
                )
        yield EvalExample(
            task.question_id(example), str(task.gold(example)), choices, tuple(len(text) - 1 for _, text in pairs)
        )


def _encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    task: PromptTask,
    examples: Sequence[Example],
    prefixes: Sequence[str],
    protocol: Protocol,
) -> Iterator[EvalExample]:
    prompts = [prefix + task.training_pair(example)[0] for example, prefix in zip(examples, prefixes, strict=True)]
    encoded = encode_prompts(tokenizer, prompts, protocol.max_tokens - protocol.max_new_tokens)
    for example, prompt in zip(examples, encoded, strict=True):
        yield EvalExample(task.question_id(example), task.gold(example), (prompt,))


@dataclass(frozen=True)
class Scored:
    """Outcomes and metrics of a model on one or several tasks."""

    outcomes: tuple[Outcome, ...]
    by_task: dict[str, Metrics]

    @property
    def metrics(self) -> Metrics:
        """Metrics of the only task, or of all together."""
        return combined(self.by_task)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: Sequence[EvalSet],
    protocol: Protocol,
    budgets: Budgets = CPU_BUDGETS,
) -> Scored:
    """Score a model on encoded test examples; the model is not changed. Raises `RunError` if it computes NaN."""
    found: list[Outcome] = []
    by_task = {}
    for test in tests:
        batches = compute_outcomes(model, tokenizer, test, protocol, budgets=budgets)
        outcomes = [outcome for _, outcome in sorted(pair for batch in batches for pair in batch.items())]
        by_task[test.task.name] = compute_metrics(test.task, outcomes, test.bytes_per_token)
        found += outcomes
    return Scored(tuple(found), by_task)


def compute_outcomes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: EvalSet,
    protocol: Protocol,
    known: Collection[int] = (),
    budgets: Budgets = CPU_BUDGETS,
) -> Iterator[dict[int, Outcome]]:
    """{index of an example: outcome}, batch after batch; it can be stopped after any, and go on from the `known`.

    Batches depend on the test set and the budgets alone, so that whoever stops and goes on with the same budgets gets
    the same numbers to the last bit.
    """
    task, examples = tests.task, tests.examples
    limit = budgets.generation_tokens if isinstance(task, AnswerTask) else budgets.scoring_tokens
    for batch in batches_by_length([_tokens(task, example, protocol) for example in examples], limit):
        if not all(i in known for i in batch):
            chosen = [examples[i] for i in batch]
            if isinstance(task, AnswerTask):
                found = _answers(model, tokenizer, task, chosen, protocol)
            else:
                found = _likelihoods(model, task, chosen, limit)
            yield {i: outcome for i, outcome in zip(batch, found, strict=True) if i not in known}


def _tokens(task: Task, example: EvalExample, protocol: Protocol) -> int:
    """Tokens that are read or written to score an example."""
    if isinstance(task, AnswerTask):
        return len(example.encoded[0].context) + protocol.max_new_tokens
    return question_tokens(example.encoded)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: AnswerTask,
    examples: Sequence[EvalExample],
    protocol: Protocol,
) -> Iterator[Outcome]:
    prompts = [example.encoded[0].context for example in examples]
    answers = generate(model, tokenizer, prompts, protocol.max_new_tokens, task.until)
    for example, answer in zip(examples, answers, strict=True):
        found = {metric: extract(answer.text) for metric, extract in task.extractors.items()}
        right = {metric: _agrees(task, value, example.gold) for metric, value in found.items()}
        yield Outcome(
            task.name,
            example.id,
            example.gold,
            next(iter(found.values())),
            exact_match_strict=right.get("exact_match_strict"),
            exact_match_flexible=right.get("exact_match_flexible"),
            text=answer.text,
            truncated=example.is_truncated,
            cut=answer.is_cut,
        )


def _agrees(task: AnswerTask, found: str | None, gold: str | None) -> bool:
    return found is not None and gold is not None and task.equal(found, gold)


def _likelihoods(model: PreTrainedModel, task: Task, examples: Sequence[EvalExample], tokens: int) -> Iterator[Outcome]:
    likelihoods = log_likelihoods(model, [example.encoded for example in examples], tokens)
    for example, values in zip(examples, likelihoods, strict=True):
        if not all(map(math.isfinite, values)):
            raise RunError(f"log-likelihoods must be finite, got {values} for a test example. The model overflows.")
        if isinstance(task, ChoiceTask):
            yield _choice(task, example, values)
        else:
            [window], [value] = example.encoded, values
            yield Outcome(task.name, example.id, log_likelihoods=(value / len(window.continuation),))


def _choice(task: ChoiceTask, example: EvalExample, values: Sequence[float]) -> Outcome:
    """The first of the likeliest choices."""
    best = str(max(range(len(values)), key=values.__getitem__))
    by_length = [value / length for value, length in zip(values, example.lengths, strict=True)]
    best_by_length = str(max(range(len(values)), key=by_length.__getitem__))
    return Outcome(
        task.name,
        example.id,
        example.gold,
        best,
        acc=best == example.gold,
        acc_norm=best_by_length == example.gold if task.has_normalised_accuracy else None,
        log_likelihoods=tuple(values),
        truncated=example.is_truncated,
    )
