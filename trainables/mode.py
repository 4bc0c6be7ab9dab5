"""What a mode gives the backend: a model to train, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from trainables.deployed import Deployed
from tune_sparse.config import Protocol
from tune_sparse.lora.adapter_io import save_adapter
from tune_sparse.lora.layer import sparse_lora_layers, updates, ways
from tune_sparse.pruning.masks import Masks
from tune_sparse.training.loop import adamw


class Trainee(Interface):
    """A pruned model in training."""

    @property
    def model(self) -> PreTrainedModel:
        """Computes the trained function."""

    @property
    def mixed_precision(self) -> str:
        """Of the training, in accelerate's words: "no" or "bf16"."""

    @property
    def is_merged_exactly(self) -> bool:
        """Whether the merged model computes the trained function to the last bit."""

    @property
    def trains_factors(self) -> bool:
        """Whether an unmasked low-rank update is trained, for its cost."""

    def summary(self) -> str:
        """How it is trained, for the log."""

    def parameters(self) -> list[Tensor]:
        """What is trained."""

    def optimizer(self, protocol: Protocol) -> Optimizer: ...

    def updates(self, pruned: dict[str, Tensor]) -> dict[str, Tensor]:
        """What training added to each of the weights that it began with, in float32: (O, I)."""

    def deploy(self) -> Deployed: ...

    def save(self, folder: Path) -> None:
        """Write what is needed to merge the run again, into the run's folder."""

    def violations(self, pruned: dict[str, Tensor]) -> list[str]:
        """What training changed though it must not."""

    def plain_model(self) -> PreTrainedModel:
        """The model as it was lent, without what training put into it; its weights are to be written."""


@dataclass(frozen=True)
class LoraTrainee:
    """Adapters on a frozen model."""

    adapted: PeftModel
    masks: Masks
    mode: str
    deployment: Callable[[PeftModel, Masks], Deployed]
    mixed_precision: str = "no"
    """The frozen weights have the precision of the run already, and the layers round their adapters to it."""

    @property
    def model(self) -> PreTrainedModel:
        return self.adapted.get_base_model()

    @property
    def is_merged_exactly(self) -> bool:
        return set(ways(self.adapted)) == {"dense-stored"}

    @property
    def trains_factors(self) -> bool:
        return all(layer.keep_mask is None for _, layer in sparse_lora_layers(self.adapted))

    def summary(self) -> str:
        return "adapted layers by way: " + ", ".join(f"{n} {way}" for way, n in ways(self.adapted).items())

    def parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]

    def optimizer(self, protocol: Protocol) -> Optimizer:
        return adamw(self.parameters(), protocol)

    def updates(self, pruned: dict[str, Tensor]) -> dict[str, Tensor]:
        return updates(self.adapted)

    def deploy(self) -> Deployed:
        return self.deployment(self.adapted, self.masks)

    def save(self, folder: Path) -> None:
        save_adapter(self.adapted, folder / "adapter", self.mode, self.masks)

    def violations(self, pruned: dict[str, Tensor]) -> list[str]:
        return [
            f"{name}: the frozen weight must not change in training"
            for name, layer in sparse_lora_layers(self.adapted)
            if not torch.equal(layer.base_layer.weight, pruned[name])
        ]

    def plain_model(self) -> PreTrainedModel:
        return self.adapted.unload()
