"""How good is a model at a task? Every example's outcome is kept, accuracy is their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tune_sparse.config import Protocol
from tune_sparse.data import Encoded, encode_pairs, encode_prompts
from tune_sparse.errors import RunError
from tune_sparse.tasks import Row, Task

BATCH_TOKENS = 8192
"""Padded tokens of a forward pass."""


@dataclass(frozen=True)
class Outcome:
    """What a model said to one example."""

    index: int
    correct: bool
    predicted: Any
    """choice: index of the likeliest choice. generate: the final answer found, or None."""
    gold: Any
    detail: Any
    """choice: log-likelihood of each choice. generate: the generated text."""

    def line(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scored:
    """The outcomes of a test set."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        return sum(o.correct for o in self.outcomes) / len(self.outcomes)

    @property
    def accuracy_stderr(self) -> float | None:
        """Standard error of a mean of outcomes, as lm-evaluation-harness reports it: sqrt(p(1-p)/(n-1))."""
        n = len(self.outcomes)
        return math.sqrt(self.accuracy * (1 - self.accuracy) / (n - 1)) if n > 1 else None


@dataclass(frozen=True)
class TestSet:
    """Test rows as a model's tokens: encoded once, scored many times."""

    task: Task
    golds: tuple[Any, ...]
    encoded: tuple[tuple[Encoded, ...], ...]
    """choice: one pair a choice, for each row. generate: the prompt alone, as context."""

    __test__ = False

    @property
    def truncated_fraction(self) -> float:
        """Rows that lost the start of their prompt."""
        return sum(any(e.truncated for e in row) for row in self.encoded) / len(self.encoded)


def encode_test(tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], protocol: Protocol) -> TestSet:
    """Encode test rows for `score`."""
    golds = tuple(task.gold(row) for row in rows)
    pairs = [task.pairs(row) for row in rows]
    if task.kind == "generate":
        prompts = [prompt for [(prompt, _)] in pairs]
        return TestSet(task, golds, tuple((e,) for e in encode_prompts(tokenizer, prompts, protocol.max_tokens)))
    flat = iter(encode_pairs(tokenizer, [pair for row_pairs in pairs for pair in row_pairs], protocol.max_tokens))
    return TestSet(task, golds, tuple(tuple(next(flat) for _ in row_pairs) for row_pairs in pairs))


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tests: TestSet, protocol: Protocol) -> Scored:
    """Score a model on encoded test rows; the model is not changed. Raises `RunError` if it computes NaN."""
    if tests.task.kind == "choice":
        return _score_choices(model, tests)
    return _score_answers(model, tokenizer, tests, protocol)


def _score_choices(model: PreTrainedModel, tests: TestSet) -> Scored:
    flat = [encoded for row in tests.encoded for encoded in row]
    likelihoods = iter(log_likelihoods(model, flat))
    outcomes = []
    for index, (row, gold) in enumerate(zip(tests.encoded, tests.golds, strict=True)):
        values = [next(likelihoods) for _ in row]
        if not all(map(math.isfinite, values)):
            raise RunError(f"log-likelihoods must be finite, got {values} for test row {index}. The model overflows.")
        best = max(range(len(values)), key=values.__getitem__)
        outcomes.append(Outcome(index, best == gold, best, gold, values))
    return Scored(tuple(outcomes))


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, pairs: Sequence[Encoded]) -> list[float]:
    """Summed log-probability of each continuation after its context.

    A continuation that fills the whole pair is scored from its second token on, as training learns it. Choices of
    one token share their whole input and are read off one forward pass.
    """
    inputs = [(pair.context + pair.continuation)[:-1] for pair in pairs]
    readers: dict[tuple[int, ...], list[int]] = {}
    for i, ids in enumerate(inputs):
        readers.setdefault(ids, []).append(i)
    result = [0.0] * len(pairs)
    for batch in _by_length(list(readers)):
        padded = pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True).to(model.device)
        hidden = model.model(input_ids=padded, use_cache=False).last_hidden_state
        for row, ids in enumerate(batch):
            for i in readers[ids]:
                continuation = pairs[i].continuation[-len(ids) :]
                logits = model.lm_head(hidden[row, len(ids) - len(continuation) : len(ids)])
                targets = torch.tensor(continuation, device=model.device)
                result[i] = float(logits.float().log_softmax(-1).gather(1, targets[:, None]).sum())
    return result


def _score_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tests: TestSet, protocol: Protocol
) -> Scored:
    prompts = [row[0].context for row in tests.encoded]
    texts = generate(model, tokenizer, prompts, protocol.max_new_tokens, tests.task.until)
    outcomes = []
    for index, (text, gold) in enumerate(zip(texts, tests.golds, strict=True)):
        found = tests.task.extract(text)
        correct = found is not None and tests.task.equal(found, gold)
        outcomes.append(Outcome(index, correct, found, gold, text))
    return Scored(tuple(outcomes))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    until: Sequence[str],
) -> list[str]:
    """The greedy continuation of each prompt, up to the end-of-text token or the first text of `until`."""
    texts: dict[tuple[int, ...], str] = {}
    for batch in _by_length(list(dict.fromkeys(prompts)), max_new_tokens):
        width = max(len(ids) for ids in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        attended = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attended[row, width - len(prompt) :] = 1
        _refuse_overflow(model, ids, attended)
        produced: Tensor = model.generate(
            ids.to(model.device),
            attention_mask=attended.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for prompt, text in zip(
            batch, tokenizer.batch_decode(produced[:, width:], skip_special_tokens=True), strict=True
        ):
            texts[prompt] = _cut_at(text, until)
    return [texts[prompt] for prompt in prompts]


def _refuse_overflow(model: PreTrainedModel, ids: Tensor, attended: Tensor) -> None:
    """Greedy decoding would turn NaN into a token like any other."""
    hidden = model.model(ids.to(model.device), attention_mask=attended.to(model.device), use_cache=False)
    if not model.lm_head(hidden.last_hidden_state[:, -1]).isfinite().all():
        raise RunError("logits must be finite, got NaN or inf for a test prompt. The model overflows.")


def _cut_at(text: str, until: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]


def _by_length(rows: list[tuple[int, ...]], extra: int = 0) -> list[list[tuple[int, ...]]]:
    """Batches of rows of similar length, each at most `BATCH_TOKENS` padded tokens (`extra` more a row)."""
    batches: list[list[tuple[int, ...]]] = []
    for ids in sorted(rows, key=len):
        if not batches or (len(batches[-1]) + 1) * (len(ids) + extra) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(ids)
    return batches
