"""Log-likelihoods of choices. All choices of a question are one row of tokens: a shared prefix, then each branch.

A branch sees the shared tokens and itself, and its positions go on from the shared ones, so that each choice is
read as if it stood alone, while the shared tokens are computed once.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tune_sparse.data.batching import batches_by_length, sent
from tune_sparse.data.splits import Encoded
from tune_sparse.training.no_cache import NoCache
from tune_sparse.watchdog import heartbeat

LOGITS_BYTES = 2**27
"""Bytes of the fp32 logits that are held at once."""
WORTHWHILE = 0.8
"""Choices are one row if it has at most this fraction of their tokens: a mask of its own costs time too."""
ALIKE = 0.9
"""Rows of one pass: padding costs as much as tokens."""
SHARED, PADDING = 0, -1
"""Branch of a shared token, and of padding; branches count from 1."""


@dataclass(frozen=True)
class SharedPrefixBatch:
    """Some choices of one question as one row of T tokens."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    """The branch of each token."""
    targets: tuple[tuple[tuple[int, int], ...], ...]
    """For each choice, for each token of its continuation: (place in the row, token that follows there)."""

    @property
    def is_branched(self) -> bool:
        return self.branches[-1] != SHARED


def pack_choices(choices: Sequence[Encoded], limit: int) -> list[SharedPrefixBatch]:
    """The choices, in order, as few rows of at most `limit` tokens (more, if one choice alone has more).

    Choices that share too little, as those that lost different starts, are rows of their own.
    """
    shared = _shared_tokens(choices)
    lengths = [len(_read_tokens(choice)) for choice in choices]
    if len(shared) + sum(n - len(shared) for n in lengths) > WORTHWHILE * sum(lengths):
        return [_share_prefix([choice], _read_tokens(choice)) for choice in choices]
    batches, start, size = [], 0, len(shared)
    for i, length in enumerate(lengths):
        size += length - len(shared)
        if i > start and size > limit:
            batches.append(_share_prefix(choices[start:i], shared))
            start, size = i, length
    return [*batches, _share_prefix(choices[start:], shared)]


def _read_tokens(choice: Encoded) -> tuple[int, ...]:
    """Tokens that a model reads: nothing follows the last one."""
    return (choice.context + choice.continuation)[:-1]


def _shared_tokens(choices: Sequence[Encoded]) -> tuple[int, ...]:
    """The common prefix of all choices: that of the first and the last in sorted order."""
    rows = sorted(map(_read_tokens, choices))
    differing = (i for i, (a, b) in enumerate(zip(rows[0], rows[-1], strict=False)) if a != b)
    return rows[0][: next(differing, len(rows[0]))]


def _share_prefix(choices: Sequence[Encoded], shared: tuple[int, ...]) -> SharedPrefixBatch:
    """One row: the shared tokens, then a branch for each continuation that differs before its last token.

    The choices 4 5 6, 4 8 and 7 after the context 1 2 3, which they share (a last token is never read):

        place      0 1 2 3 4 5
        tokens     1 2 3 4 5 4
        positions  0 1 2 3 4 3
        branches   0 0 0 1 1 2
        targets    (2, 4) (3, 5) (4, 6);  (2, 4) (5, 8);  (2, 7)

    A target (2, 4) asks for the probability of token 4 after place 2. 7 is the last token of its choice, so that it
    needs no branch.
    """
    tokens, positions, branches = list(shared), list(range(len(shared))), [SHARED] * len(shared)
    starts: dict[tuple[int, ...], int] = {}
    targets = []
    for choice in choices:
        whole = choice.context + choice.continuation
        branch = _read_tokens(choice)[len(shared) :]
        if branch not in starts:
            starts[branch] = len(tokens) - len(shared)
            tokens += branch
            positions += range(len(shared), len(whole) - 1)
            branches += [len(starts)] * len(branch)
        read_at = range(len(choice.context) - 1, len(whole) - 1)
        targets.append(tuple((p if p < len(shared) else p + starts[branch], whole[p + 1]) for p in read_at))
    return SharedPrefixBatch(tuple(tokens), tuple(positions), tuple(branches), tuple(targets))


def question_tokens(choices: Sequence[Encoded]) -> int:
    """Tokens that are read to score a question."""
    return sum(len(packed.tokens) for packed in pack_choices(choices, sys.maxsize))


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, questions: Sequence[Sequence[Encoded]], tokens: int) -> list[list[float]]:
    """Summed log-probability of each continuation after its context, for each choice of each question.

    Contexts must have at least one token. A pass reads at most `tokens` tokens, padding included, whatever the number
    of questions and choices: a question with many choices is divided.
    """
    owned = [(i, packed) for i, choices in enumerate(questions) for packed in pack_choices(choices, tokens // 4)]
    by_row: dict[int, list[float]] = {}
    for batch in batches_by_length([len(packed.tokens) for _, packed in owned], tokens, ALIKE):
        values = _read(model, [owned[k][1] for k in batch])
        heartbeat()
        by_row |= dict(zip(batch, values, strict=True))
    result: list[list[float]] = [[] for _ in questions]
    for k, (i, _) in enumerate(owned):
        result[i] += by_row[k]
    return result


def _read(model: PreTrainedModel, rows: Sequence[SharedPrefixBatch]) -> list[list[float]]:
    """Log-likelihoods of the choices of each row, from one forward pass. Logits are computed only where they are read,
    once for each place. The device is waited for once, at the end."""
    hidden = _hidden(model, rows)
    width = hidden.shape[1]
    targets = [(i * width + at, token) for i, row in enumerate(rows) for choice in row.targets for at, token in choice]
    places = sorted({place for place, _ in targets})
    index = {place: k for k, place in enumerate(places)}
    order = sorted(range(len(targets)), key=lambda j: targets[j][0])
    wanted = [index[targets[j][0]] for j in order]
    tokens = [targets[j][1] for j in order]
    read = hidden.flatten(0, 1).index_select(0, sent(torch.tensor(places), model.device))
    head = model.get_output_embeddings()
    step = max(1, LOGITS_BYTES // (4 * head.weight.shape[0]))
    found = []
    for start in range(0, len(places), step):
        logits = head(read[start : start + step]).float()
        first, last = bisect_left(wanted, start), bisect_left(wanted, start + step)
        k = sent(torch.tensor(wanted[first:last]) - start, model.device)
        token = sent(torch.tensor(tokens[first:last]), model.device)
        found.append(logits[k, token] - logits.logsumexp(-1)[k])
    by_target = dict(zip(order, torch.cat(found).tolist(), strict=True))
    values = (by_target[j] for j in range(len(targets)))
    return [[math.fsum(next(values) for _ in choice) for choice in row.targets] for row in rows]


def _hidden(model: PreTrainedModel, rows: Sequence[SharedPrefixBatch]) -> Tensor:
    """Last hidden states of each row: (B, T, hidden)."""

    def padded(values: Sequence[tuple[int, ...]], padding: int) -> Tensor:
        return sent(pad_sequence([torch.tensor(row) for row in values], True, padding), model.device)

    ids = padded([row.tokens for row in rows], 0)
    if not any(row.is_branched for row in rows):
        return model.base_model(input_ids=ids, use_cache=False, past_key_values=NoCache()).last_hidden_state
    positions = padded([row.positions for row in rows], 0)
    branches = padded([row.branches for row in rows], PADDING)
    mask = branch_mask(positions, branches, getattr(model.config, "sliding_window", None))
    return model.base_model(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state


def branch_mask(positions: Tensor, branches: Tensor, window: int | None) -> Tensor:
    """Which key each query sees: (B, T, T) of bool, from positions and branches (B, T).

    A token sees the shared tokens and its own branch up to itself; with a sliding window, the last `window` of them.
    """
    query, key = positions[:, :, None], positions[:, None, :]
    seen = (branches[:, None, :] == SHARED) | (branches[:, :, None] == branches[:, None, :])
    seen &= key <= query
    if window is not None:
        seen &= key > query - window
    return seen
