"""Masked finetuning: the pruned weights themselves are trained, W <- W⊙M after every optimizer step; W is scored.

The older form of sparse-to-sparse (Mocanu et al. 2018, arXiv:1707.04780, with a fixed mask), without LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from trainables.also_trained import AlsoTrained, also_in
from trainables.mode import MergeReport
from tune_sparse.config import Protocol
from tune_sparse.files import write_json
from tune_sparse.lora.also_io import read_also_into
from tune_sparse.lora.merging import UpdateSums, any_nonzero, read_flags, squared_sums
from tune_sparse.models.architectures import list_matrices
from tune_sparse.models.checkpoints import write_weights_into
from tune_sparse.models.safetensors_io import TensorFiles, TensorWriter
from tune_sparse.pruning.masks import Masks, mask_sha256

SAVED = Path("weights") / "weights.safetensors"


def setup(mode: str, model: PreTrainedModel, protocol: Protocol, masks: Masks) -> MaskedFinetuning:
    """Make the prunable weights of `model` trainable, in place, in float32 whatever the precision of the run."""
    for weight in _matrices(model).values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    also = AlsoTrained.begin(also_in(model, protocol))
    return MaskedFinetuning(model, masks, getattr(torch, protocol.precision), mode, also)


def restore_into(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights that a run saved in its folder into the model."""
    write_weights_into(model, TensorFiles([folder / SAVED]))
    read_also_into(model, (folder / SAVED).parent)


def _matrices(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """{matrix: the model's own parameter}"""
    return {matrix.name: model.get_parameter(matrix.name) for matrix in list_matrices(model)}


def _update_rows(weight: Tensor, before: Tensor, rows: slice) -> Tensor:
    return weight[rows] - before[rows].float()


def enforce_masks_after_steps(optimizer: Optimizer, weights: Mapping[str, Tensor], masks: Masks) -> None:
    """Every step of `optimizer` ends with W <- W⊙M, and the same for both moments: a masked weight that kept its
    momentum would jump back with the next step."""

    @torch.no_grad()
    def enforce(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        for name, weight in weights.items():
            mask = masks[name]
            for tensor in (weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]):
                tensor.mul_(mask)

    optimizer.register_step_post_hook(enforce)


@dataclass(frozen=True)
class MaskedFinetuning:
    """The prunable weights of a model in training."""

    model: PreTrainedModel
    masks: Masks
    precision: torch.dtype
    mode: str
    also: AlsoTrained
    factor_weights: int = 0
    last_masks: Masks | None = None

    @property
    def mixed_precision(self) -> str:
        return "bf16" if self.precision == torch.bfloat16 else "no"

    @property
    def is_merged_exactly(self) -> bool:
        """Not where training computes with float32 weights and merges them rounded."""
        return self.precision == torch.float32

    def shrunk(self) -> AbstractContextManager[None]:
        return nullcontext()

    def summary(self) -> str:
        also = f", and {len(self.also.own)} other weights" if self.also.own else ""
        return f"{len(self.masks)} matrices trained in float32, masked after every step{also}"

    def parameters(self) -> list[Tensor]:
        return [*_matrices(self.model).values(), *self.also.parameters()]

    def optimizer(self, protocol: Protocol) -> Optimizer:
        matrices = _matrices(self.model)
        optimizer = self.also.optimizer(list(matrices.values()), protocol)
        enforce_masks_after_steps(optimizer, matrices, self.masks)
        return optimizer

    def save(self, folder: Path) -> None:
        """The trained matrices in the precision of the run: there is no small adapter to keep."""
        path, matrices = folder / SAVED, _matrices(self.model)
        path.parent.mkdir()
        with TensorWriter(path, {name: (weight.shape, self.precision) for name, weight in matrices.items()}) as writer:
            for name, weight in matrices.items():
                writer.write(name, weight.detach().to(self.precision))
            writer.done()
        self.also.save(path.parent)
        write_json(path.with_name("tune_sparse.json"), {"mode": self.mode, "mask_sha256": mask_sha256(self.masks)})

    @torch.no_grad()
    def merge_into_model(self, pruned: Mapping[str, Tensor]) -> MergeReport:
        """The weights get the precision of the run, one matrix after the other."""
        sums, is_filled = [], {}
        for name, weight in _matrices(self.model).items():
            before, rounded = pruned[name], weight.to(self.precision)
            sums.append(squared_sums(partial(_update_rows, weight, before), before, rounded))
            is_filled[name] = any_nonzero(weight, ~self.masks[name])
            weight.data = rounded
        filled = read_flags(is_filled)
        self.unwrap()
        violations = [f"{name}: masked weights must stay 0 in training" for name in filled] + self.also.violations()
        return MergeReport(UpdateSums.read(sums).rounded_away_fraction, violations)

    def unwrap(self) -> PreTrainedModel:
        for weight in _matrices(self.model).values():
            weight.requires_grad_(False)
            weight.data = weight.data.to(self.precision)
        self.also.end()
        return self.model
