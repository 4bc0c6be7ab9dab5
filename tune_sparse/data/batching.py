"""Examples of different lengths as batches of token ids: padded, or packed behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tune_sparse.data.splits import Encoded

PADDED = 1.07
"""Padded over true tokens that micro-batches may have, where more of them would cost less than they save."""
PASS_TOKENS = (1280, 640, 320, 160)
"""A micro-batch more takes about as much time as the last of these numbers of tokens, on a GPU that builds effective
weights again as much as the first."""


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens, and the N of their tokens that are targets: predicted, and counted in the loss."""

    ids: Tensor
    """(B, T)"""
    places: Tensor
    """(N,): of the token before each target, counted over all B T tokens"""
    targets: Tensor
    """(N,): the tokens that follow there"""
    positions: Tensor | None = None
    """(B, T): of each token in its own example, where several share a sequence: transformers keeps attention within
    each"""

    def predicts_target(self) -> Tensor:
        """Whether a target follows each token: (B, T) of bool."""
        found = torch.zeros(self.ids.numel(), dtype=torch.bool)
        found[self.places] = True
        return found.view(self.ids.shape)


def batches_by_length(sizes: Sequence[int], tokens: int, alike: float = 0.0) -> list[list[int]]:
    """Indices in batches of similar size, the largest first: padded, none has more than `tokens` (if it has more than
    one member), and its smallest has at least the fraction `alike` of its largest."""
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        largest = sizes[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * largest <= tokens and sizes[i] >= alike * largest:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def batches_with_little_padding(sizes: Sequence[int], tokens: int) -> list[list[int]]:
    """As `batches_by_length`, but more batches where few would be padded by more than `PADDED` allows."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    falling, starts = [sizes[i] for i in order], list[int]()
    for pass_tokens in PASS_TOKENS:
        starts = _cheapest_starts(falling, tokens, pass_tokens)
        padded = sum((end - start) * falling[start] for start, end in pairwise([*starts, len(order)]))
        if padded <= PADDED * sum(sizes):
            break
    return [order[start:end] for start, end in pairwise([*starts, len(order)])]


def _cheapest_starts(falling: Sequence[int], tokens: int, pass_tokens: int) -> list[int]:
    """Where batches of sizes in falling order start so that their padded tokens, and `pass_tokens` for each batch, are
    fewest: what is before `end` costs least if its last batch begins at the best `start`."""
    costs, best_starts = [0], [0]
    for end in range(1, len(falling) + 1):
        best, start = costs[end - 1] + falling[end - 1], end - 1
        for earlier in range(end - 2, -1, -1):
            padded = (end - earlier) * falling[earlier]
            if padded > tokens:
                break
            if costs[earlier] + padded < best:
                best, start = costs[earlier] + padded, earlier
        costs.append(best + pass_tokens)
        best_starts.append(start)
    starts, end = list[int](), len(falling)
    while end:
        end = best_starts[end]
        starts.append(end)
    return starts[::-1]


def micro_batches(
    examples: Sequence[Encoded], tokens: int, train_on_prompt: bool = False, pack_to: int | None = None
) -> list[Batch]:
    """All of `examples` in batches of at most `tokens` tokens, padding included, the longest examples first.

    With `pack_to`, examples stand behind one another in sequences of at most so many tokens. Only a single example of
    more than `tokens` makes a larger batch.
    """
    sequences = [(example,) for example in examples] if pack_to is None else pack(examples, min(pack_to, tokens))
    sizes = [sum(map(example_tokens, sequence)) for sequence in sequences]
    return [
        as_batch([sequences[i] for i in chosen], train_on_prompt, pack_to is not None)
        for chosen in batches_with_little_padding(sizes, tokens)
    ]


def pack(examples: Sequence[Encoded], pack_to: int) -> list[tuple[Encoded, ...]]:
    """Examples in sequences of at most `pack_to` tokens, longer ones first, each in the first that has room for it."""
    bins: list[list[Encoded]] = []
    for example in sorted(examples, key=example_tokens, reverse=True):
        fitting = (found for found in bins if sum(map(example_tokens, found)) + example_tokens(example) <= pack_to)
        found = next(fitting, None)
        if found is None:
            bins.append([example])
        else:
            found.append(example)
    return [tuple(found) for found in bins]


def as_batch(sequences: Sequence[Sequence[Encoded]], train_on_prompt: bool = False, packed: bool = False) -> Batch:
    """Sequences of one or more examples, padded on the right, where a causal model never looks."""
    width = max(sum(map(example_tokens, sequence)) for sequence in sequences)
    ids, positions = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(2))
    places: list[int] = []
    for i, sequence in enumerate(sequences):
        end = i * width
        for example in sequence:
            start, end = end, end + example_tokens(example)
            ids.view(-1)[start:end] = torch.tensor(example.context + example.continuation)
            positions.view(-1)[start:end] = torch.arange(end - start)
            places += range(end - 1 - target_tokens(example, train_on_prompt), end - 1)
    before = torch.tensor(places, dtype=torch.long)
    return Batch(ids, before, ids.view(-1)[before + 1], positions if packed else None)


def example_tokens(example: Encoded) -> int:
    return len(example.context) + len(example.continuation)


def target_tokens(example: Encoded, train_on_prompt: bool) -> int:
    """Tokens that the loss counts: the continuation, or all but the first, before which nothing could predict it."""
    return example_tokens(example) - (1 if train_on_prompt else max(1, len(example.context)))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device still computes."""
    return tensor.to(device, non_blocking=True)
