"""How likely is each choice? All choices of a question are one row of tokens: what they share, then each branch.

A branch sees the shared tokens and itself, and its positions go on from the shared ones, so that each choice is
read as if it stood alone, while the shared tokens are computed once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tune_sparse.data.splits import Encoded
from tune_sparse.watchdog import heartbeat

LOGITS_BYTES = 2**27
"""Of the fp32 logits that are held at once."""
WORTHWHILE = 0.8
"""Choices are one row if it has at most this fraction of their tokens: a mask of its own costs time too."""
ALIKE = 0.9
"""Rows of one pass: padding costs as much as tokens."""
SHARED, PADDING = 0, -1
"""As a token's branch; branches count from 1."""


@dataclass(frozen=True)
class Tree:
    """Some choices of one question as one row of T tokens."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    """The branch of each token."""
    reads: tuple[tuple[tuple[int, int], ...], ...]
    """For each choice: (where in the row, which token follows there) for each token of its continuation."""

    @property
    def is_branched(self) -> bool:
        return self.branches[-1] != SHARED


def trees_of(choices: Sequence[Encoded], limit: int) -> list[Tree]:
    """The choices, in order, as few rows of at most `limit` tokens (more, if one choice alone has more).

    Choices that share too little, as those that lost different starts, are rows of their own.
    """
    shared = _shared_tokens(choices)
    lengths = [len(_read_tokens(choice)) for choice in choices]
    if len(shared) + sum(n - len(shared) for n in lengths) > WORTHWHILE * sum(lengths):
        return [_tree([choice], _read_tokens(choice)) for choice in choices]
    trees, start, size = [], 0, len(shared)
    for i, length in enumerate(lengths):
        size += length - len(shared)
        if i > start and size > limit:
            trees.append(_tree(choices[start:i], shared))
            start, size = i, length
    return [*trees, _tree(choices[start:], shared)]


def _read_tokens(choice: Encoded) -> tuple[int, ...]:
    """What a model reads: nothing follows the last token."""
    return (choice.context + choice.continuation)[:-1]


def _shared_tokens(choices: Sequence[Encoded]) -> tuple[int, ...]:
    """What all choices begin with: what the first and the last in order have in common."""
    rows = sorted(map(_read_tokens, choices))
    differing = (i for i, (a, b) in enumerate(zip(rows[0], rows[-1], strict=False)) if a != b)
    return rows[0][: next(differing, len(rows[0]))]


def _tree(choices: Sequence[Encoded], shared: tuple[int, ...]) -> Tree:
    tokens, positions, branches = list(shared), list(range(len(shared))), [SHARED] * len(shared)
    starts: dict[tuple[int, ...], int] = {}
    reads = []
    for choice in choices:
        whole = choice.context + choice.continuation
        branch = _read_tokens(choice)[len(shared) :]
        if branch not in starts:
            starts[branch] = len(tokens) - len(shared)
            tokens += branch
            positions += range(len(shared), len(whole) - 1)
            branches += [len(starts)] * len(branch)
        read_at = range(len(choice.context) - 1, len(whole) - 1)
        reads.append(tuple((p if p < len(shared) else p + starts[branch], whole[p + 1]) for p in read_at))
    return Tree(tuple(tokens), tuple(positions), tuple(branches), tuple(reads))


def batches_by_length(sizes: Sequence[int], batch_tokens: int, alike: float = 0.0) -> list[list[int]]:
    """Indices in batches of similar size, the largest first: padded, none has more than `batch_tokens` (if it has
    more than one row), and its smallest row has at least the fraction `alike` of its largest."""
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        largest = sizes[batches[-1][0]] if batches else 0
        if not batches or (len(batches[-1]) + 1) * largest > batch_tokens or sizes[i] < alike * largest:
            batches.append([])
        batches[-1].append(i)
    return batches


def question_tokens(choices: Sequence[Encoded]) -> int:
    """Tokens that are read to score a question."""
    return sum(len(tree.tokens) for tree in trees_of(choices, sys.maxsize))


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, questions: Sequence[Sequence[Encoded]], batch_tokens: int
) -> list[list[float]]:
    """Summed log-probability of each continuation after its context, for each choice of each question.

    Contexts must have at least one token. Memory is bounded by `batch_tokens`, whatever the number of questions and
    choices: a question with many choices is divided.
    """
    owned = [(i, tree) for i, choices in enumerate(questions) for tree in trees_of(choices, batch_tokens // 4)]
    of_tree: dict[int, list[float]] = {}
    for batch in batches_by_length([len(tree.tokens) for _, tree in owned], batch_tokens, ALIKE):
        values = _read(model, [owned[k][1] for k in batch])
        heartbeat()
        of_tree |= dict(zip(batch, values, strict=True))
    result: list[list[float]] = [[] for _ in questions]
    for k, (i, _) in enumerate(owned):
        result[i] += of_tree[k]
    return result


def _read(model: PreTrainedModel, trees: Sequence[Tree]) -> list[list[float]]:
    """Log-likelihoods of each tree's choices, from one forward pass. Logits are computed only where they are read,
    once for each place."""
    hidden = _hidden(model, trees)
    reads = [(row, at, token) for row, tree in enumerate(trees) for choice in tree.reads for at, token in choice]
    places = sorted({(row, at) for row, at, _ in reads})
    index = {place: k for k, place in enumerate(places)}
    rows, ats = torch.tensor(places, device=model.device).T
    wanted = torch.tensor([index[row, at] for row, at, _ in reads], device=model.device)
    tokens = torch.tensor([token for _, _, token in reads], device=model.device)
    log_probabilities = torch.empty(len(reads), device=model.device)
    head = model.get_output_embeddings()
    step = max(1, LOGITS_BYTES // (4 * head.weight.shape[0]))
    for start in range(0, len(places), step):
        logits = head(hidden[rows[start : start + step], ats[start : start + step]]).float()
        here = (wanted >= start) & (wanted < start + step)
        k = wanted[here] - start
        log_probabilities[here] = logits[k, tokens[here]] - logits.logsumexp(-1)[k]
    values = iter(log_probabilities.tolist())
    return [[math.fsum(next(values) for _ in choice) for choice in tree.reads] for tree in trees]


def _hidden(model: PreTrainedModel, trees: Sequence[Tree]) -> Tensor:
    """Last hidden states of each row: (B, T, hidden)."""

    def padded(rows: Sequence[tuple[int, ...]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, value).to(model.device)

    ids = padded([tree.tokens for tree in trees], 0)
    if not any(tree.is_branched for tree in trees):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    positions = padded([tree.positions for tree in trees], 0)
    branches = padded([tree.branches for tree in trees], PADDING)
    mask = tree_mask(positions, branches, getattr(model.config, "sliding_window", None))
    return model.base_model(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state


def tree_mask(positions: Tensor, branches: Tensor, window: int | None) -> Tensor:
    """Which key each query sees: (B, T, T) of bool, from positions and branches (B, T).

    A token sees the shared tokens and its own branch up to itself; with a sliding window, the last `window` of them.
    """
    query, key = positions[:, :, None], positions[:, None, :]
    seen = (branches[:, None, :] == SHARED) | (branches[:, :, None] == branches[:, None, :])
    seen &= key <= query
    if window is not None:
        seen &= key > query - window
    return seen
