"""The interface of a fine-tuning mode: a model that is trained, saved, and merged in place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol as Interface

from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.pruning.masks import Masks
from tune_sparse.training.loop import StepHooks


@dataclass(frozen=True)
class MergeReport:
    """The findings of a merge, collected while it writes matrix after matrix."""

    rounded_away_fraction: float
    """The share of the squared update that adding it to the weights in their precision lost."""
    violations: list[str]
    """What training changed though it must not."""
    metrics: dict[str, float] = field(default_factory=dict)
    """of this mode alone"""


class TrainableModel(Interface):
    """A pruned model in training."""

    @property
    def model(self) -> PreTrainedModel:
        """Computes the trained function."""

    @property
    def masks(self) -> Masks:
        """As they are by now: a schedule changes them while it trains."""

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

    @property
    def last_masks(self) -> Masks | None:
        """What masks the merged weights before they are kept; None where nothing is left to mask."""

    def summary(self) -> str:
        """Say how it is trained, for the log."""

    def parameters(self) -> list[Tensor]:
        """List what is trained."""

    def optimizer(self, protocol: Protocol) -> Optimizer: ...

    def hooks(self, optimizer: Optimizer) -> StepHooks:
        """What its training does besides in each step of that optimizer."""

    def save(self, folder: Path) -> None:
        """Write what is needed to merge the run again, into the run's folder."""

    def merge_into_model(self, pruned: Mapping[str, Tensor]) -> MergeReport:
        """Write the trained weights into the model, one matrix at a time, and take out what training put into it.

        It computes the trained function after that: the last masks are left to be applied.
        pruned: the weights that training began with, each read once.
        """

    def unwrap(self) -> PreTrainedModel:
        """Take out of the model what training put into it, without a merge: its weights are left to be written."""
