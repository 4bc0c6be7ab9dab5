"""The interface of a fine-tuning mode: a model that is trained, merged and saved."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol as Interface

from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from tune_sparse.config import Protocol


@dataclass(frozen=True)
class MergedWeights:
    """The weights that a mode makes of what it trained: (O, I) by name."""

    before_mask: dict[str, Tensor]
    """They compute exactly the trained function."""
    after_mask: dict[str, Tensor] | None = None
    """They are scored and kept, where a last mask changes them."""
    metrics: dict[str, float] = field(default_factory=dict)


class TrainableModel(Interface):
    """A pruned model in training."""

    @property
    def model(self) -> PreTrainedModel:
        """Computes the trained function."""

    @property
    def mixed_precision(self) -> str:
        """The precision of the training in accelerate's words: "no" or "bf16"."""

    @property
    def is_merged_exactly(self) -> bool:
        """Whether the merged model computes the trained function to the last bit."""

    def shrunk(self) -> AbstractContextManager[None]:
        """Let the model be without what its masks cut out, where they cut whole heads and channels: in this context it
        is summed up and trained, and out of it merged and saved."""

    @property
    def factor_weights(self) -> int:
        """Weights of a trained low-rank update that is not masked, for its cost."""

    def summary(self) -> str:
        """Say how it is trained, for the log."""

    def parameters(self) -> list[Tensor]:
        """List what is trained."""

    def optimizer(self, protocol: Protocol) -> Optimizer: ...

    def updates(self, pruned: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute what training added to each of the weights that it began with, in float32: (O, I)."""

    def merge(self) -> MergedWeights:
        """Compute the merged weights. The model is not changed."""

    def save(self, folder: Path) -> None:
        """Write what is needed to merge the run again, into the run's folder."""

    def violations(self, pruned: dict[str, Tensor]) -> list[str]:
        """Find what training changed though it must not."""

    def unwrap(self) -> PreTrainedModel:
        """Take out of the model what training put into it; its weights are left to be written."""
