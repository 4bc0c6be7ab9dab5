"""Greedy answers with a key-value cache: rows leave the batch as soon as they are complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from tune_sparse.errors import RunError
from tune_sparse.watchdog import heartbeat

SHRINK_BELOW = 0.75
"""The batch is rebuilt when fewer than this fraction of its rows are still being written."""
CHECK_EVERY = 4
"""Steps between two looks for the end of an answer in the text: each look decodes."""
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


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    until: Sequence[str],
) -> list[str]:
    """The greedy continuation of each prompt of one batch, up to the end-of-text token or the first text of `until`.

    Raises `RunError` if the model computes NaN, which greedy decoding would turn into a token like any other.
    """
    written: list[list[int]] = [[] for _ in prompts]
    present, open_rows = list(range(len(prompts))), set(range(len(prompts)))
    ids, attended = (tensor.to(model.device) for tensor in _padded_left(prompts))
    head, cache = model.get_output_embeddings(), Cache(layer_class_to_replicate=PreallocatedCache)
    for step in range(1, max_new_tokens + 1):
        heartbeat()
        positions = (attended.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden = model.base_model(
            input_ids=ids, attention_mask=attended, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        best = head(hidden).max(-1)
        if not best.values.isfinite().all():
            raise RunError("logits must be finite, got NaN or inf for a test prompt. The model overflows.")
        for i, token in zip(present, best.indices.tolist(), strict=True):
            if i in open_rows and token == tokenizer.eos_token_id:
                open_rows.remove(i)
            elif i in open_rows:
                written[i].append(token)
        if step % CHECK_EVERY == 0:
            open_rows -= {i for i in open_rows if _has_ended(tokenizer, written[i], until)}
        if not open_rows:
            break
        ids = best.indices[:, None]
        if len(open_rows) < SHRINK_BELOW * len(present):
            kept = torch.tensor([row for row, i in enumerate(present) if i in open_rows], device=model.device)
            cache.batch_select_indices(kept)
            ids, attended, present = ids[kept], attended[kept], [i for i in present if i in open_rows]
        attended = torch.cat([attended, attended.new_ones(len(present), 1)], dim=1)
    return [_cut_at(tokenizer.decode(tokens, skip_special_tokens=True), until) for tokens in written]


def _padded_left(prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are attended to: (B, T) each."""
    width = max(map(len, prompts))
    ids = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts])
    attended = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, attended


def _has_ended(tokenizer: PreTrainedTokenizerBase, tokens: list[int], until: Sequence[str]) -> bool:
    """True if one of `until` was completed since the last look: a token has at least one byte of it."""
    newest = tokens[-CHECK_EVERY - max((len(stop.encode()) for stop in until), default=0) :]
    text = tokenizer.decode(newest, skip_special_tokens=True)
    return any(stop in text for stop in until)


def _cut_at(text: str, until: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]
