"""The LoRA modes: adapters on a frozen model, trained and merged as the facts of the mode say.

| mode | computes in training | merged |
| --- | --- | --- |
| dense | (W + sBA)x | W + sBA |
| sparse-to-dense | (W⊙M + sBA)x | (W⊙M + sBA)⊙M: the last mask removes what filled the zeros |
| sparse-to-sparse | (W⊙M + s(BA)⊙M)x | the same weight: the zeros stay zero |

Sparse-to-sparse under structured masks trains without the heads and channels that are masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from trainables.also_trained import AlsoTrained, also_in
from trainables.mode import MergeReport
from tune_sparse.config import Protocol
from tune_sparse.lora.adapter_io import merge_adapter_into, save_adapter
from tune_sparse.lora.compact_training import Cuts, find_cuts, shrunk
from tune_sparse.lora.layer import adapt_model, count_impls, sparse_lora_layers
from tune_sparse.lora.merging import merge_adapters_into
from tune_sparse.models.architectures import PRUNED
from tune_sparse.models.dims import ModelDims
from tune_sparse.modes import MODES
from tune_sparse.pruning.masks import Masks
from tune_sparse.training.loop import NO_HOOKS, StepHooks


def setup(
    mode: str, model: PreTrainedModel, protocol: Protocol, masks: Masks, seed: int, modules: Sequence[str] = PRUNED
) -> LoraFinetuning:
    """Put adapters into `modules` of `model`, in place."""
    update_masks = masks if MODES[mode].masks_update else None
    may_shrink = update_masks is not None and protocol.may_train_smaller
    cuts = find_cuts(ModelDims.from_config(model.config), masks) if may_shrink else None
    own = also_in(model, protocol)
    adapted = adapt_model(model, protocol, update_masks, seed, modules)
    return LoraFinetuning(adapted, masks, mode, AlsoTrained.begin(own), cuts)


def restore_into(model: PreTrainedModel, folder: Path, masks: Masks) -> None:
    """Merge what a run saved in its folder into the pruned model."""
    merge_adapter_into(model, folder / "adapter", masks)


@dataclass(frozen=True)
class LoraFinetuning:
    """Adapters on a frozen model."""

    adapted: PeftModel
    masks: Masks
    mode: str
    also: AlsoTrained
    cuts: Cuts | None = None
    """What the model is without while it trains; None where it trains whole."""
    mixed_precision: str = "no"
    """The frozen weights have the precision of the run already, and the layers round their adapters to it."""

    @property
    def model(self) -> PreTrainedModel:
        return self.adapted.get_base_model()

    @property
    def is_merged_exactly(self) -> bool:
        return set(count_impls(self.adapted)) == {"effective-weight"}

    @property
    def factor_weights(self) -> int:
        is_masked = any(layer.keep_mask is not None for _, layer in sparse_lora_layers(self.adapted))
        return 0 if is_masked else sum(parameter.numel() for parameter in self._factors())

    def shrunk(self) -> AbstractContextManager[None]:
        return shrunk(self.adapted, self.cuts) if self.cuts is not None else nullcontext()

    @property
    def last_masks(self) -> Masks | None:
        return self.masks if MODES[self.mode].masks_at_merge else None

    def summary(self) -> str:
        counts = ", ".join(f"{n} {impl}" for impl, n in count_impls(self.adapted).items())
        size = "" if self.cuts is None else ", on the smaller model without masked heads and channels"
        also = f"; {len(self.also.own)} other weights trained too" if self.also.own else ""
        return f"adapted layers by implementation: {counts}{size}{also}"

    def _factors(self) -> list[Tensor]:
        beside = {id(parameter) for parameter in self.also.own.values()}
        return [p for p in self.adapted.parameters() if p.requires_grad and id(p) not in beside]

    def parameters(self) -> list[Tensor]:
        return [*self._factors(), *self.also.parameters()]

    def optimizer(self, protocol: Protocol) -> Optimizer:
        return self.also.optimizer(self._factors(), protocol)

    def hooks(self, optimizer: Optimizer) -> StepHooks:
        return NO_HOOKS

    def save(self, folder: Path) -> None:
        save_adapter(self.adapted, folder / "adapter", self.mode, self.masks, trained_compact=self.cuts is not None)
        self.also.save(folder / "adapter")

    def merge_into_model(self, pruned: Mapping[str, Tensor]) -> MergeReport:
        merge = merge_adapters_into(self.adapted, pruned, self.last_masks)
        self.unwrap()
        violations = [f"{name}: the frozen weight must not change in training" for name in merge.changed]
        violations += [f"{name}: the merged weight must compute what its layer does" for name in merge.strayed]
        removed = {"update_removed_fraction": merge.sums.removed_fraction} if self.last_masks is not None else {}
        violations += self.also.violations()
        return MergeReport(merge.sums.rounded_away_fraction, violations, removed)

    def unwrap(self) -> PreTrainedModel:
        self.also.end()
        return self.adapted.unload()
