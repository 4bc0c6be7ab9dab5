"""The merge of trained adapters into the only copy of the weights, matrix by matrix, and the fate of their update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.lora.layer import SparseLora, sparse_lora_layers
from tune_sparse.lora.masked_linear import Plain
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.models.float_bits import CHUNK, row_chunks
from tune_sparse.pruning.masks import Masks, mask_into

PROBE_INPUTS = 16
"""Inputs on which a merged weight is compared with its layer."""
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative differences that rounding explains: a few times the last digit, and sums over thousands of inputs."""


@dataclass(frozen=True)
class UpdateSums:
    """Squared sums over all matrices of an update."""

    whole: float
    rounded_away: float
    """of what adding it to the weights in their precision lost"""
    removed: float
    """of what a mask removes of it"""

    @classmethod
    def read(cls, sums: Sequence[Tensor]) -> UpdateSums:
        """Add up what `squared_sums` computed for each matrix, waiting for the device once."""
        return cls(*(sum(part) for part in torch.stack(list(sums)).T.tolist()))

    @property
    def rounded_away_fraction(self) -> float:
        return self.rounded_away / self.whole if self.whole else 0.0

    @property
    def removed_fraction(self) -> float:
        return self.removed / self.whole if self.whole else 0.0


def squared_sums(
    update: Callable[[slice], Tensor], before: Tensor, after: Tensor, last_mask: Tensor | None = None
) -> Tensor:
    """|U|², |U - (after - before)|² and |U - U⊙M|² of one matrix: (3,), float64, on its device.

    update: makes some rows of U, in float32. last_mask: M; without one nothing is removed. All are (O, I).
    """
    total = torch.zeros(3, dtype=torch.float64, device=before.device)
    for rows in row_chunks(before, CHUNK // 4):  # which float64 makes four times as wide as bfloat16
        wanted = update(rows)
        arrived = after[rows].float() - before[rows].float()
        parts = [wanted, wanted - arrived]
        if last_mask is not None:
            parts.append(wanted - wanted * last_mask[rows])
        for place, part in enumerate(parts):
            total[place] += part.double().square().sum()
    return total


def differs(weight: Tensor, other: Tensor) -> Tensor:
    """Whether two matrices differ anywhere: a bool on their device."""
    return torch.stack([(weight[rows] != other[rows]).any() for rows in row_chunks(weight)]).any()


def any_nonzero(weight: Tensor, where: Tensor) -> Tensor:
    """Whether a matrix has another value than 0 where `where` says: a bool on its device."""
    return torch.stack([((weight[rows] != 0) & where[rows]).any() for rows in row_chunks(weight)]).any()


def read_flags(flags: Mapping[str, Tensor]) -> list[str]:
    """The names whose flag is set, waiting for the device once."""
    if not flags:
        return []
    return [name for name, is_set in zip(flags, torch.stack(list(flags.values())).tolist(), strict=True) if is_set]


@dataclass(frozen=True)
class AdapterMerge:
    """The findings of a merge."""

    sums: UpdateSums
    changed: list[str]
    """Frozen weights that training changed."""
    strayed: list[str]
    """Merged weights that compute another function than their layers."""


def strays(layer: SparseLora, merged: Tensor) -> Tensor:
    """Whether a merged weight computes another function than its plain layer: a bool on its device.

    The layer adds what W and BA each make of x, the merged weight multiplies by their rounded sum, which must agree
    but for rounding: |difference| <= `ROUNDING` |y|, over normally distributed inputs. It is asked of each layer
    because rounding adds up over blocks: the logits of a pruned model in bfloat16 may have no digit left.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_INPUTS, merged.shape[1], generator=random).to(merged)
    wanted = layer(x).float()
    difference = F.linear(x, merged, layer.base_layer.bias).float() - wanted
    return ~(difference.norm() <= ROUNDING[merged.dtype] * wanted.norm())


@torch.no_grad()
def merge_adapters_into(
    adapted: PeftModel, pruned: Mapping[str, Tensor], last_masks: Masks | None = None
) -> AdapterMerge:
    """Write the weight that each adapted layer computes with into its frozen weight; the adapters stay.

    pruned: what the frozen weights must be, each read once. last_masks: what will mask the merged weights; they are
    looked at and not applied.
    """
    sums, is_changed, is_strayed = [], {}, {}
    for name, layer in sparse_lora_layers(adapted):
        weight, before = layer.frozen, layer.oriented(pruned[name])
        is_changed[name] = differs(weight, before)
        merged = layer.merged_weight()
        if isinstance(layer.impl, Plain):
            is_strayed[name] = strays(layer, merged)
        last = layer.oriented(last_masks[name]) if last_masks else None
        sums.append(squared_sums(layer.update_rows(), before, merged, last))
        weight.copy_(merged)
    return AdapterMerge(UpdateSums.read(sums), read_flags(is_changed), read_flags(is_strayed))


@torch.no_grad()
def mask_weights_into(model: PreTrainedModel, masks: Masks) -> None:
    """W <- W⊙M for every prunable matrix of a model."""
    for name, weight in prunable_weights(model).items():
        mask_into(weight, masks[name])
