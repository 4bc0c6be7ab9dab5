"""The training stage of a cell on this machine, on its CPU or GPU."""

from __future__ import annotations

from collections.abc import Generator

from trainables.loaded import Examples
from trainables.mode import TrainableModel
from trainables.pruning_stage import Pruned
from trainables.run_log import RunLog
from trainables.rungs import Rungs
from trainables.training import Training, train
from tune_sparse.ledger.contracts import RunStore
from tune_sparse.ledger.run import Run
from tune_sparse.training.budgets import Budgets
from tune_sparse.training.loop import Step


def train_stage(
    run: Run,
    trainable: TrainableModel,
    pruned: Pruned,
    examples: Examples,
    budgets: Budgets,
    ledger: RunStore,
    log: RunLog,
    rungs: Rungs | None = None,
) -> Generator[Step | None, None, Training]:
    checkpoint = ledger.checkpoint(run.run_id)
    return (yield from train(run, trainable, examples, budgets, checkpoint, log, rungs))
