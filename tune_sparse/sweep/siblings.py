"""Siblings: the trainings of one cell that differ in their settings, which alone early stopping compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tune_sparse.config import EarlyStopping
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import InputError
from tune_sparse.ledger.run import Run

LIKE_WITH_LIKE = ("steps", "train_on_prompt", "max_tokens", "max_new_tokens", "num_fewshot", "n_selection")
"""The settings of a protocol without which two values at a rung are not of the same thing."""


def siblings_of(run: Run) -> tuple[Any, ...]:
    """Names the siblings among which a training is: its cell's, of as many steps, judged on the same."""
    return run.cell, *(getattr(run.protocol, name) for name in LIKE_WITH_LIKE)


def check_siblings(config: EarlyStopping, runs: Iterable[Run]) -> None:
    """Raise `InputError` where early stopping has nothing to compare, or a training has no room for its rungs."""
    counts = Counter(map(siblings_of, runs))
    for run in runs:
        config.rung_steps(run.protocol.steps)
        if config.stop_early == "accuracy" and not all(
            isinstance(task, PromptTask) for task in tasks_named(run.cell.task)
        ):
            raise InputError(
                f"stop_early accuracy needs tasks with questions, got {run.cell.task}, which is text. Give loss."
            )
    if counts and max(counts.values()) < 2:
        raise InputError(
            "stop_early compares trainings of one cell that differ in their settings, got one training for each cell. "
            "Give several values of a setting with --axis, or leave stop_early out."
        )


def rivals_of(run: Run, by_sparsity: bool) -> tuple[Any, ...]:
    """Names the trainings that one is compared with where all cells compete: its mode's and schedule's, since a model
    before its last mask, or before its masks grew, is not judged beside one after; with the sparsity as an aim of its
    own, those of as many zeros."""
    c, likewise = run.cell, tuple(getattr(run.protocol, name) for name in LIKE_WITH_LIKE)
    return c.mode, c.schedule, *((c.sparsity,) if by_sparsity else ()), *likewise
