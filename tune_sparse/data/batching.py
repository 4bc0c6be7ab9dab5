"""Rows of different lengths as one batch of token ids: padded, or packed behind one another."""

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
    """of each token in its own row, where several rows share a sequence: transformers keeps attention within them"""


def padded(rows: Sequence[Encoded], train_on_prompt: bool) -> Batch:
    """Each row a sequence, padded on the right."""
    return _batch([[row] for row in rows], train_on_prompt)


def packed(rows: Sequence[Encoded], train_on_prompt: bool, pack_to: int) -> Batch:
    """Rows behind one another in sequences of at most `pack_to` tokens, longer rows first, each in the first sequence
    that has room for it."""
    bins: list[list[Encoded]] = []
    for row in sorted(rows, key=_length, reverse=True):
        fitting = (found for found in bins if sum(map(_length, found)) + _length(row) <= pack_to)
        found = next(fitting, None)
        if found is None:
            bins.append([row])
        else:
            found.append(row)
    batch = _batch(bins, train_on_prompt)
    positions = torch.zeros_like(batch.ids)
    for i, found in enumerate(bins):
        places = torch.cat([torch.arange(_length(row)) for row in found])
        positions[i, : len(places)] = places
    return Batch(batch.ids, batch.loss_mask, positions)


def _batch(sequences: Sequence[Sequence[Encoded]], train_on_prompt: bool) -> Batch:
    width = max(sum(map(_length, rows)) for rows in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    loss_mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, rows in enumerate(sequences):
        start = 0
        for row in rows:
            end = start + _length(row)
            ids[i, start:end] = torch.tensor(row.context + row.continuation)
            # The first token of a row has nothing before it that could predict it.
            first = 1 if train_on_prompt else max(1, len(row.context))
            loss_mask[i, start + first : end] = True
            start = end
    return Batch(ids, loss_mask)


def _length(row: Encoded) -> int:
    return len(row.context) + len(row.continuation)
