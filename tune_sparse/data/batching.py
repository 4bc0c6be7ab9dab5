"""Examples of different lengths as batches of token ids: padded, or packed behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_sparse.data.splits import Encoded


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


def micro_batches(
    examples: Sequence[Encoded], tokens: int, train_on_prompt: bool = False, pack_to: int | None = None
) -> list[Batch]:
    """All of `examples` in batches of at most `tokens` tokens, padding included, the longest first.

    With `pack_to`, examples stand behind one another in sequences of at most so many tokens. Only a single example of
    more than `tokens` makes a larger batch.
    """
    sequences = [(example,) for example in examples] if pack_to is None else pack(examples, min(pack_to, tokens))
    sizes = [sum(map(example_tokens, sequence)) for sequence in sequences]
    return [
        as_batch([sequences[i] for i in chosen], train_on_prompt, pack_to is not None)
        for chosen in batches_by_length(sizes, tokens)
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
            # The first token of an example has nothing before it that could predict it.
            first = 1 if train_on_prompt else max(1, len(example.context))
            places += range(start + first - 1, end - 1)
    before = torch.tensor(places, dtype=torch.long)
    return Batch(ids, before, ids.view(-1)[before + 1], positions if packed else None)


def example_tokens(example: Encoded) -> int:
    return len(example.context) + len(example.continuation)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device still computes."""
    return tensor.to(device, non_blocking=True)
