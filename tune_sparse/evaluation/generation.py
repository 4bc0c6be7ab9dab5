"""Greedy answers with a key-value cache: rows leave the batch when they are seen to be complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from tune_sparse.data.batching import sent
from tune_sparse.errors import RunError
from tune_sparse.watchdog import heartbeat

SHRINK_BELOW = 0.75
"""The batch is rebuilt when fewer than this fraction of its rows are still being written."""
LOOK_EVERY, LOOK_EVERY_ON_CPU = 16, 4
"""Steps between two looks at what was written: each waits for the device, and decodes."""
NOT_FINITE = -1
"""In the place of a token that a model computed from NaN or inf."""
NOWHERE = -1
"""Position of padding."""
CACHE_GROWTH = 64
"""Tokens that a cache makes room for at a time."""


class PreallocatedCache(DynamicLayer):
    """The key-value cache of a layer, with room for the next tokens: a step writes its own token alone.

    The cache of transformers copies all that was there at each step.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens so far, with the new ones: (B, heads, T, head size) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers: tuple[Tensor, ...] = (key_states[:, :, :0], value_states[:, :, :0])
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._buffers = tuple(
                F.pad(buffer[:, :, :start], (0, 0, 0, end + CACHE_GROWTH - start)) for buffer in self._buffers
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        end = self.get_seq_length()
        self._buffers = tuple(buffer[indices] for buffer in self._buffers)
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch that are still computed, on the device.

    Prompts are padded on the right, where a causal model does not look while it reads them, and every row writes its
    next token behind the padding. After the prompts 1 2 3 and 4 and the answers 5 6 and 7 8 the cache holds

        tokens     1 2 3 5 6      4 - - 7 8
        positions  0 1 2 3 4      0     1 2
    """

    lengths: Tensor
    """(B,): tokens of each prompt"""
    positions: Tensor
    """(B, width + new tokens): of each place of the cache in its text, `NOWHERE` for padding"""
    width: int
    """of the longest prompt"""
    is_even: bool
    """All prompts are as long, so that attention needs no mask."""

    @classmethod
    def begin(cls, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, device: torch.device) -> _Rows:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width, new = int(lengths.max()), torch.arange(max_new_tokens)
        read = torch.arange(width).expand(len(prompts), -1)
        positions = torch.cat([read.where(read < lengths[:, None], NOWHERE), lengths[:, None] + new], dim=1)
        return cls(sent(lengths, device), sent(positions, device), width, bool((lengths == width).all()))

    def kept(self, rows: Tensor) -> _Rows:
        return replace(self, lengths=self.lengths[rows], positions=self.positions[rows])

    def last_token(self, end: int, window: int | None) -> dict[str, Tensor]:
        """What the model needs to read the last token before the place `end`: its position, and where prompts are
        padded, which places it sees."""
        position = self.positions[:, end - 1 : end]
        if self.is_even:
            return {"position_ids": position}
        seen = self.positions[:, :end] > (NOWHERE if window is None else (position - window).clamp(min=NOWHERE))
        return {"position_ids": position, "attention_mask": seen[:, None, None]}


@dataclass(frozen=True)
class Answer:
    """A generated text, without its end."""

    text: str
    is_cut: bool
    """The limit ended it, before the model did."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    until: Sequence[str],
) -> list[Answer]:
    """The greedy continuation of each prompt of one batch, up to the end-of-text token or the first text of `until`.

    Between two looks at what was written, the device is not waited for. Raises `RunError` if the model computes NaN,
    which greedy decoding would turn into a token like any other.
    """
    answers = [_Writing(tokenizer, until) for _ in prompts]
    present, rows = list(range(len(prompts))), _Rows.begin(prompts, max_new_tokens, model.device)
    look_every = LOOK_EVERY_ON_CPU if model.device.type == "cpu" else LOOK_EVERY
    cache = Cache(layer_class_to_replicate=PreallocatedCache)
    tokens, unseen = _best_tokens(model, _read_prompts(model, prompts, rows, cache)), list[Tensor]()
    for step in range(1, max_new_tokens + 1):
        heartbeat()
        unseen.append(tokens)
        if step % look_every == 0 or step == max_new_tokens:
            for i, written in zip(present, torch.stack(unseen, dim=1).tolist(), strict=True):
                answers[i].add(written)
            unseen = []
            still = [row for row, i in enumerate(present) if not answers[i].is_complete]
            if not still or step == max_new_tokens:
                break
            if len(still) < SHRINK_BELOW * len(present):
                kept = sent(torch.tensor(still), model.device)
                cache.batch_select_indices(kept)
                tokens, rows, present = tokens[kept], rows.kept(kept), [present[row] for row in still]
        tokens = _best_tokens(model, _read_token(model, tokens, rows, step, cache))
    return [answer.read() for answer in answers]


def _read_prompts(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], rows: _Rows, cache: Cache) -> Tensor:
    """The last hidden state of each prompt: (B, hidden)."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    hidden = model.base_model(input_ids=sent(ids, model.device), past_key_values=cache, use_cache=True)
    last = (rows.lengths - 1)[:, None, None].expand(-1, 1, hidden.last_hidden_state.shape[-1])
    return hidden.last_hidden_state.gather(1, last)[:, 0]


def _read_token(model: PreTrainedModel, tokens: Tensor, rows: _Rows, step: int, cache: Cache) -> Tensor:
    """The hidden state of the token that each row wrote in a step, from 1: (B, hidden)."""
    seen = rows.last_token(rows.width + step, getattr(model.config, "sliding_window", None))
    ids = tokens.clamp(min=0)[:, None]
    return model.base_model(input_ids=ids, past_key_values=cache, use_cache=True, **seen).last_hidden_state[:, -1]


def _best_tokens(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The likeliest token after each hidden state, `NOT_FINITE` where the model overflows: (B,)."""
    best = model.get_output_embeddings()(hidden).max(-1)
    return best.indices.where(best.values.isfinite(), NOT_FINITE)


class _Writing:
    """The tokens of an answer so far, without the end of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> None:
        self.is_complete = False
        self._tokens: list[int] = []
        self._tokenizer, self._until = tokenizer, until
        self._longest_stop = max((len(stop.encode()) for stop in until), default=0)

    def add(self, written: Sequence[int]) -> None:
        """Add what was written since the last look; nothing more once the answer is complete. Raises `RunError`."""
        if self.is_complete:
            return
        before = len(self._tokens)
        for token in written:
            if token == NOT_FINITE:
                raise RunError("logits must be finite, got NaN or inf for a test prompt. The model overflows.")
            if token == self._tokenizer.eos_token_id:
                self.is_complete = True
                return
            self._tokens.append(token)
        # A token has at least one byte of a stop, so that it began no further back.
        newest = self._decoded(self._tokens[max(0, before - self._longest_stop) :])
        self.is_complete = any(stop in newest for stop in self._until)

    def read(self) -> Answer:
        whole = self._decoded(self._tokens)
        end = min((whole.find(stop) for stop in self._until if stop in whole), default=len(whole))
        return Answer(whole[:end], not self.is_complete)

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
