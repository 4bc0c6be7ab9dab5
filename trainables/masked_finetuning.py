"""Masked finetuning: the pruned weights themselves are trained, under masks that stay or change; W is scored.

The older form of sparse-to-sparse (Mocanu et al. 2018, arXiv:1707.04780), without LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from trainables.also_trained import AlsoTrained, also_in
from trainables.mask_schedule import FIXED_MASKS, MaskSchedule
from trainables.masked_steps import CurrentMasks, MaskedSteps
from trainables.mode import MergeReport
from tune_sparse.config import Protocol
from tune_sparse.files import write_json
from tune_sparse.lora.also_io import read_also_into
from tune_sparse.lora.merging import UpdateSums, any_nonzero, read_flags, squared_sums
from tune_sparse.models.architectures import list_matrices
from tune_sparse.models.checkpoints import write_weights_into
from tune_sparse.models.safetensors_io import TensorFiles, TensorWriter
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.masks import Masks, packed
from tune_sparse.pruning.straight_through import StraightThrough
from tune_sparse.training.loop import StepHooks

SAVED = Path("weights") / "weights.safetensors"


def setup(
    mode: str, model: PreTrainedModel, protocol: Protocol, masks: Masks, schedule: MaskSchedule = FIXED_MASKS
) -> MaskedFinetuning:
    """Make the prunable weights of `model` trainable, in place, in float32 whatever the precision of the run."""
    for weight in _matrices(model).values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    also = AlsoTrained.begin(also_in(model, protocol))
    current = CurrentMasks(packed(masks))
    below = list_matrices(model) if schedule.is_revivable else []
    layers = [StraightThrough(model, matrix, current) for matrix in below]
    return MaskedFinetuning(model, current, getattr(torch, protocol.precision), mode, also, schedule, layers)


def restore_into(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights that a run saved in its folder into the model."""
    write_weights_into(model, TensorFiles([folder / SAVED]))
    read_also_into(model, (folder / SAVED).parent)


def _matrices(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """{matrix: the model's own parameter}"""
    return {matrix.name: model.get_parameter(matrix.name) for matrix in list_matrices(model)}


def _update_rows(weight: Tensor, before: Tensor, rows: slice) -> Tensor:
    return weight[rows] - before[rows].float()


@dataclass(frozen=True)
class MaskedFinetuning:
    """The prunable weights of a model in training."""

    model: PreTrainedModel
    current: CurrentMasks
    precision: torch.dtype
    mode: str
    also: AlsoTrained
    schedule: MaskSchedule
    straight_through: Sequence[StraightThrough]
    """Layers whose weights are trained below their masks"""
    factor_weights: int = 0
    last_masks: Masks | None = None

    @property
    def masks(self) -> BitMasks:
        return self.current.now

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
        count = len(self.schedule.updates)
        changes = f"their masks updated {count} times" if count else "their masks fixed"
        return f"{len(self.masks)} matrices trained in float32, {changes}{also}"

    def parameters(self) -> list[Tensor]:
        return [*_matrices(self.model).values(), *self.also.parameters()]

    def optimizer(self, protocol: Protocol) -> Optimizer:
        return self.also.optimizer(list(_matrices(self.model).values()), protocol)

    def hooks(self, optimizer: Optimizer) -> StepHooks:
        return MaskedSteps(_matrices(self.model), self.current, optimizer, self.schedule)

    def _effective(self, name: str, weight: Tensor) -> Tensor:
        """The weight that its layer computes with."""
        return weight * self.masks[name] if self.straight_through else weight

    def save(self, folder: Path) -> None:
        """The trained matrices in the precision of the run: there is no small adapter to keep."""
        path, matrices = folder / SAVED, _matrices(self.model)
        path.parent.mkdir()
        with TensorWriter(path, {name: (weight.shape, self.precision) for name, weight in matrices.items()}) as writer:
            for name, weight in matrices.items():
                writer.write(name, self._effective(name, weight.detach()).to(self.precision))
            writer.done()
        self.also.save(path.parent)
        write_json(path.with_name("tune_sparse.json"), {"mode": self.mode, "mask_sha256": self.masks.sha256})

    @torch.no_grad()
    def merge_into_model(self, pruned: Mapping[str, Tensor]) -> MergeReport:
        """The weights get the precision of the run, one matrix after the other."""
        sums, is_filled = [], {}
        for name, weight in _matrices(self.model).items():
            before, after = pruned[name], self._effective(name, weight)
            rounded = after.to(self.precision)
            sums.append(squared_sums(partial(_update_rows, after, before), before, rounded))
            is_filled[name] = any_nonzero(after, ~self.masks[name])
            weight.data = rounded
        filled = read_flags(is_filled)
        self.unwrap()
        violations = [f"{name}: masked weights must stay 0 in training" for name in filled] + self.also.violations()
        return MergeReport(UpdateSums.read(sums).rounded_away_fraction, violations)

    def unwrap(self) -> PreTrainedModel:
        for weight in _matrices(self.model).values():
            weight.requires_grad_(False)
            weight.data = weight.data.to(self.precision)
        for layer in self.straight_through:
            layer.end()
        self.also.end()
        return self.model
