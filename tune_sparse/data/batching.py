"""Examples of different lengths as one batch of token ids: padded, or packed behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_sparse.data.splits import Encoded


@dataclass(frozen=True)
class Batch:
    """Sequences of one width: (B, T) each."""

    ids: Tensor
    loss_mask: Tensor
    """bool: the target tokens, which are predicted and count in the loss"""
    positions: Tensor | None = None
    """of each token in its own example, where several share a sequence: transformers keeps attention within each"""


def padded(examples: Sequence[Encoded], train_on_prompt: bool) -> Batch:
    """Each example a sequence, padded on the right."""
    return _batch([[example] for example in examples], train_on_prompt)


def packed(examples: Sequence[Encoded], train_on_prompt: bool, pack_to: int) -> Batch:
    """Examples behind one another in sequences of at most `pack_to` tokens, longer ones first, each in the first
    sequence that has room for it."""
    bins: list[list[Encoded]] = []
    for example in sorted(examples, key=_length, reverse=True):
        fitting = (found for found in bins if sum(map(_length, found)) + _length(example) <= pack_to)
        found = next(fitting, None)
        if found is None:
            bins.append([example])
        else:
            found.append(example)
    batch = _batch(bins, train_on_prompt)
    positions = torch.zeros_like(batch.ids)
    for i, found in enumerate(bins):
        places = torch.cat([torch.arange(_length(example)) for example in found])
        positions[i, : len(places)] = places
    return Batch(batch.ids, batch.loss_mask, positions)


def _batch(sequences: Sequence[Sequence[Encoded]], train_on_prompt: bool) -> Batch:
    width = max(sum(map(_length, examples)) for examples in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    loss_mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, examples in enumerate(sequences):
        start = 0
        for example in examples:
            end = start + _length(example)
            ids[i, start:end] = torch.tensor(example.context + example.continuation)
            # The first token of an example has nothing before it that could predict it.
            first = 1 if train_on_prompt else max(1, len(example.context))
            loss_mask[i, start + first : end] = True
            start = end
    return Batch(ids, loss_mask)


def _length(example: Encoded) -> int:
    return len(example.context) + len(example.continuation)
