"""Weights that are trained beside the pruned matrices or their adapters: `Protocol.train_also`.

The optimizer steps float32 copies; the model computes with their rounding to the precision of the run, so that a merge
has nothing to add. In float32 a copy is the weight itself. PERP (Zimmer et al. 2023, arXiv:2312.15230) trains so the
biases and norms of a pruned model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.lora.also_io import write_also
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.models.other_weights import other_parameters
from tune_sparse.training.loop import adamw


@dataclass(frozen=True)
class AlsoTrained:
    """Weights of a model in training that have neither mask nor adapter."""

    own: Mapping[str, nn.Parameter]
    """The model's, in the precision of the run"""
    copies: Mapping[str, nn.Parameter]
    """What the optimizer steps, in float32"""
    hooks: tuple[RemovableHandle, ...]

    @classmethod
    def begin(cls, own: Mapping[str, nn.Parameter]) -> AlsoTrained:
        """Let the backward of each micro-batch add its gradients of `own`, in place, to those of float32 copies."""
        copies = {name: nn.Parameter(parameter.detach().float()) for name, parameter in own.items()}
        hooks = []
        for name, parameter in own.items():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(_gives_gradient_to(copies[name])))
        return cls(own, copies, tuple(hooks))

    def parameters(self) -> list[Tensor]:
        return list(self.copies.values())

    def optimizer(self, others: list[Tensor], protocol: Protocol) -> Optimizer:
        """Make the optimizer of these and of others, whose steps and restored states reach the model at once.

        Biases and norms have one axis, and no weight decay: it would pull a scale to 0, where it shuts a channel off.
        """
        decayed = others + [copy for copy in self.parameters() if copy.ndim > 1]
        optimizer = adamw(decayed, protocol, [copy for copy in self.parameters() if copy.ndim == 1])
        if self.own:
            optimizer.register_step_post_hook(self._copy_into_model)
            optimizer.register_load_state_dict_post_hook(self._copy_into_model)
        return optimizer

    @torch.no_grad()
    def _copy_into_model(self, *_: Any) -> None:
        for name, parameter in self.own.items():
            parameter.copy_(self.copies[name])

    def save(self, folder: Path) -> None:
        """Write them as the model has them; nothing where there are none."""
        if self.own:
            write_also(self.own, folder)

    def violations(self) -> list[str]:
        infinite = [name for name, parameter in self.own.items() if not parameter.isfinite().all()]
        return [f"{name}: weights must be finite" for name in infinite]

    def end(self) -> None:
        """Freeze the weights in the model; what was trained stays in them."""
        for hook in self.hooks:
            hook.remove()
        for parameter in self.own.values():
            parameter.requires_grad_(False)


def _gives_gradient_to(copy: nn.Parameter) -> Any:
    def give(own: Tensor) -> None:
        assert own.grad is not None
        gradient = own.grad.float()
        copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
        own.grad = None

    return give


def also_in(model: PreTrainedModel, protocol: Protocol) -> dict[str, nn.Parameter]:
    """{name: parameter} of what a protocol trains beside, in a model without adapters."""
    return other_parameters(model, protocol.train_also) if protocol.train_also else {}


def scored_weights(model: PreTrainedModel, protocol: Protocol) -> dict[str, Tensor]:
    """{name: weight} of all that a run prunes or trains, in a model without adapters: what its checksum covers."""
    return prunable_weights(model) | also_in(model, protocol)
