"""Rungs of one training: where it is judged, by what, and what is not told yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from accelerate import Accelerator

from trainables.inputs import load_planned_checkpoint, load_planned_splits
from trainables.loaded import Examples
from trainables.mode import TrainableModel
from tune_sparse.data.tasks import tasks_named
from tune_sparse.evaluation.metrics import score_name
from tune_sparse.evaluation.scoring import encode_test, score
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import load_tokenizer
from tune_sparse.training.budgets import Budgets
from tune_sparse.training.loop import mean_loss

Reached = tuple[int, str, float]
"""step, by, value"""


@dataclass
class Rungs:
    """What a training says at its rungs. by: loss or accuracy."""

    steps: tuple[int, ...]
    by: str
    _untold: list[tuple[int, float]] = field(default_factory=list)

    @property
    def is_waiting(self) -> bool:
        """Whether something is to be told before the training goes on."""
        return bool(self._untold)

    def reach(self, step: int, value: float) -> Reached:
        self._untold.append((step, value))
        return step, self.by, value

    def reach_again(self, reached: Iterable[Reached]) -> bool:
        """Tell once more what a checkpoint knows: it may have been killed before. Returns whether that is anything."""
        self._untold += [(step, value) for step, by, value in reached if step in self.steps and by == self.by]
        return self.is_waiting

    def told(self) -> list[tuple[int, float]]:
        """(step, value) of every rung since the last call."""
        told, self._untold = self._untold, []
        return told


def rung_value(
    run: Run, by: str, trainable: TrainableModel, examples: Examples, budgets: Budgets, accelerator: Accelerator
) -> float:
    """Loss or accuracy on the selection examples of the model as it trains, before any last mask. Changes nothing that
    the training goes on with."""
    if by == "loss":
        return mean_loss(trainable.model, examples.selection, run.protocol, accelerator, budgets)
    model, checkpoint = trainable.model, load_planned_checkpoint(run)
    tokenizer, protocol = load_tokenizer(checkpoint.path), run.protocol.within(checkpoint.dims.max_positions)
    tests = [
        encode_test(tokenizer, task, splits.selection, protocol, splits.shots)
        for task, splits in zip(tasks_named(run.cell.task), load_planned_splits(run, protocol), strict=True)
    ]
    was_training = model.training
    model.eval()
    with accelerator.autocast():
        metrics = score(model, tokenizer, tests, protocol, budgets).metrics
    model.train(was_training)
    return float(metrics[score_name(metrics)])
