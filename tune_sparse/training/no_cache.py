"""A key-value cache that holds nothing, for models that read whole texts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class NoCache(Cache):
    """Without a cache, transformers asks the device in every forward pass whether a sequence holds several texts, and
    waits for the answer. With one it does not."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states
