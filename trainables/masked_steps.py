"""Optimizer steps under masks: gradients masked before they are clipped, and masks that change after a step.

A weight and moments that are 0 stay 0 where the gradient is 0, so that a step masks nothing else. An update of the
masks zeroes what it drops and grows, the weight and both moments: a weight that kept its momentum would jump with the
next step. Cerebras' sparsity algorithms and jaxpruner do the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from trainables.mask_schedule import MaskSchedule
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.masks import mask_into
from tune_sparse.schedules import Update
from tune_sparse.training.loop import StepHooks


class CurrentMasks(Mapping[str, Tensor]):
    """The masks of a training as they are by now."""

    def __init__(self, masks: BitMasks) -> None:
        self.now = masks

    def __getitem__(self, name: str) -> Tensor:
        return self.now[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


class MaskedSteps(StepHooks):
    """Steps of an optimizer over the weights of masked matrices, and perhaps over others."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], masks: CurrentMasks, optimizer: Optimizer, schedule: MaskSchedule
    ) -> None:
        self._weights, self._masks, self._optimizer, self._schedule = weights, masks, optimizer, schedule

    @torch.no_grad()
    def clip(self, step: int, parameters: list[Tensor], max_norm: float) -> None:
        """Mask the gradients of the matrices, and clip the norm of all that is left.

        Where the update after this step reads gradients of masked weights they stay, outside of the norm: the update
        then zeroes what the optimizer makes of them.
        """
        keeps_dense = self._schedule.grows_by_gradient_after(step)
        masked = {} if self._schedule.is_revivable else self._weights
        names: dict[Tensor, str] = {weight: name for name, weight in masked.items()}
        norms = []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if parameter in names:
                gradient = gradient.clone() if keeps_dense else gradient
                mask_into(gradient, self._masks[names[parameter]])
            norms.append(torch.linalg.vector_norm(gradient))
            del gradient  # or two would live at once
        clip_grads_with_norm_(parameters, max_norm, torch.linalg.vector_norm(torch.stack(norms)))

    @torch.no_grad()
    def after(self, step: int) -> None:
        update = self._schedule.updates.get(step)
        if update is not None:
            self._masks.now = BitMasks.pack(self._updated_into(update))

    def _updated_into(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        """Yield each new mask once its weight and moments are masked."""
        for name, change in self._schedule.changes(update, self._weights, self._masks.now):
            if not self._schedule.is_revivable:
                for tensor in self._with_moments(self._weights[name]):
                    mask_into(tensor, change.survivors)
            yield name, change.keep

    def _with_moments(self, weight: nn.Parameter) -> list[Tensor]:
        state = self._optimizer.state.get(weight, {})
        return [weight.data, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]

    def state(self) -> dict[str, Any]:
        return {"mask_bits": dict(self._masks.now.bits)} if self._schedule.updates else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        now = self._masks.now
        devices = {name: bits.device for name, bits in now.bits.items()}
        bits = {name: bits.to(devices[name]) for name, bits in state["mask_bits"].items()}
        self._masks.now = BitMasks.from_bits(bits, now.shapes)
