"""The training of a super-adapter: every optimizer step trains a slice of its own, everything else sees all of it."""

from __future__ import annotations

from dataclasses import dataclass

from trainables.lora_finetuning import LoraFinetuning
from trainables.mode import TrainableModel
from tune_sparse.ledger.run import Run
from tune_sparse.lora.rank_space import SuperAdapter
from tune_sparse.lora.slices import count_layers, set_ranks_into
from tune_sparse.training.loop import StepHooks


@dataclass(frozen=True)
class SampledSlices(StepHooks):
    """The slices that a training activates in its adapters, in place."""

    trainable: LoraFinetuning
    super_adapter: SuperAdapter
    seed: int
    layers: int

    @classmethod
    def from_run(cls, run: Run, trainable: TrainableModel) -> SampledSlices | None:
        """None for a run that trains no super-adapter."""
        if run.super_adapter is None:
            return None
        assert isinstance(trainable, LoraFinetuning), "a mode without adapters trains no super-adapter"
        return cls(trainable, run.super_adapter, run.draw_seed, count_layers(trainable.adapted))

    def before(self, step: int) -> None:
        """Activate a slice, in place: a rank sampled in the forward would be sampled again where activation
        checkpointing computes it again."""
        space = self.super_adapter.space
        set_ranks_into(
            self.trainable.adapted,
            space,
            space.sample_ranks(self.layers, step - 1, self.seed, self.super_adapter.sampling),
        )

    def after(self, step: int) -> None:
        """Activate everything."""
        space = self.super_adapter.space
        set_ranks_into(self.trainable.adapted, space, space.maximal(self.layers))
