"""What the stages of a cell share and hand on: its inputs and outputs, the trained model, its scores."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from trainables.loaded import Examples, LoadedModel
from trainables.mode import TrainableModel
from trainables.peak_memory import PeakMemory
from trainables.run_log import RunLog
from trainables.training import Training
from tune_sparse.data.batching import example_tokens
from tune_sparse.data.splits import Encoded
from tune_sparse.evaluation.memory import PROBE_TOKENS
from tune_sparse.evaluation.scoring import Scored, score
from tune_sparse.ledger.contracts import RunStore
from tune_sparse.ledger.run import Run
from tune_sparse.training.budgets import Budgets
from tune_sparse.training.loop import mean_loss

PROBE_EXAMPLES = 8


@dataclass(frozen=True)
class Work:
    """The inputs and outputs that every stage of a cell shares."""

    run: Run
    ledger: RunStore
    folder: Path
    log: RunLog
    loaded: LoadedModel
    examples: Examples
    budgets: Budgets
    memory: PeakMemory

    @property
    def probe(self) -> list[Encoded]:
        """The first examples, on which logits are compared: one at least, and few enough tokens for their logits."""
        train = self.examples.train
        lengths = accumulate(map(example_tokens, train[:PROBE_EXAMPLES]))
        return train[: max(1, sum(length <= PROBE_TOKENS for length in lengths))]

    def score(self) -> Scored:
        """Score the model as its weights are now."""
        return score(self.loaded.model, self.loaded.tokenizer, self.examples.tests, self.run.protocol, self.budgets)

    def eval_loss(self) -> float:
        """The loss on the selection examples of the model as its weights are now."""
        return mean_loss(self.loaded.model, self.examples.selection, self.run.protocol, budgets=self.budgets)


@dataclass(frozen=True)
class Trained:
    """The model after its training, not merged yet."""

    trainable: TrainableModel
    training: Training
    step_flops: int | None


@dataclass(frozen=True)
class BeforeMask:
    """The merged model before its last mask."""

    scored: Scored
    eval_loss: float


@dataclass(frozen=True)
class Scores:
    """Scores of the merged model, also before its last mask where it has one."""

    scored: Scored
    before_mask: BeforeMask | None
    seconds: float
    weights_sha256: str
    """of what was scored"""
