"""How far a difference may be claimed: for these trainings, these models and tasks, or models or tasks in general.

A scope says what is drawn anew in the sentence's "in general", and so what its variance is made of (docs/statistics.md;
tests/test_simulation.py measures how often each is wrong). Whatever is not drawn is fixed: the sentence names it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from analysis.read.results import Predictions
from analysis.stats.crossed import Block, CrossedMean, Floats, over_both, over_columns
from analysis.stats.paired import LEVEL, difference_interval, mcnemar_p
from analysis.stats.statistics import Estimate

FEWEST_SEEDS = 3
"""of a setting, from which on the spread between its trainings is known well enough for a verdict"""
FEWEST_UNITS = 5
"""of models, or of tasks, that speak for models or tasks in general"""


class Scope(Enum):
    """What a sentence holds for, and what is drawn: each also draws the test examples anew."""

    TRAININGS = "these trainings"
    LISTED = "these models and tasks"
    TASKS = "tasks in general, with these models"
    MODELS = "models in general, on these tasks"
    BOTH = "models and tasks in general"

    @property
    def has_verdict(self) -> bool:
        """Whether more than these very trainings is spoken of, so that one side may be called the better one."""
        return self is not Scope.TRAININGS


@dataclass(frozen=True)
class Differences:
    """The paired differences of one model on one task: means over the settings that have all of the seeds."""

    backend: str
    model: str
    task: str
    seeds: tuple[int, ...]
    values: Floats
    """(seeds, examples)"""
    predictions: Predictions
    """of one of the runs, which names the examples"""
    pairs: int
    run_ids: tuple[str, ...] = ()
    shares_masks: bool = False
    """whether a random mask is in it, which is that of every task of a model and seed"""

    @property
    def mean(self) -> float:
        return float(self.values.mean(axis=0) @ self.predictions.weights)

    @cached_property
    def questions(self) -> int:
        return hash(tuple(self.predictions.ids))

    def blocks(self, share: float) -> list[Block]:
        """A block, or of a mixture one a task. Seeds are drawn anew for each model and task, but for random masks."""
        group = (self.model,) if self.shares_masks else (self.backend, self.model, self.task)
        tasks, ids = self.predictions.tasks, self.predictions.ids
        chosen = {task: tasks == task for task in dict.fromkeys(tasks)}
        share /= len(chosen)
        return [Block(self.values[:, of], group, self.seeds, task, ids[of], share) for task, of in chosen.items()]


@dataclass(frozen=True)
class Scoped:
    """A scope, and the differences that it is claimed from."""

    scope: Scope
    used: tuple[Differences, ...]

    def estimate(self, level: float = LEVEL) -> Estimate:
        """The mean difference, each model and task counting alike, with its interval at `level`."""
        found, test = ESTIMATORS[self.scope](self.used)
        e = t_estimate(found, test, level, min(len(d.predictions.ids) for d in self.used))
        return e if self.scope.has_verdict else replace(e, p=math.nan)

    @property
    def pairs(self) -> int:
        return sum(d.pairs for d in self.used)

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(run for d in self.used for run in d.run_ids)

    @property
    def seeds(self) -> int:
        """The fewest of a model and task."""
        return min(len(d.seeds) for d in self.used)

    @property
    def models(self) -> list[str]:
        return sorted({d.model for d in self.used})

    @property
    def tasks(self) -> list[str]:
        return sorted({d.task for d in self.used})

    @property
    def agreeing(self) -> int:
        """How many of the models and tasks have a difference of the sign of the mean."""
        sign = np.sign(sum(d.mean for d in self.used))
        return sum(bool(np.sign(d.mean) == sign) for d in self.used)


def find_scopes(found: Sequence[Differences]) -> list[Scoped]:
    """The scopes that have enough seeds, models or tasks, the most general first; these trainings where none has."""
    grid = _complete_grid(found)
    scopes = [Scoped(scope, grid) for scope in _general_scopes(grid)]
    if seeded := tuple(d for d in found if len(d.seeds) >= FEWEST_SEEDS):
        scopes.append(Scoped(Scope.LISTED, seeded))
    return scopes or ([Scoped(Scope.TRAININGS, tuple(found))] if found else [])


def _general_scopes(grid: Sequence[Differences]) -> list[Scope]:
    """The largest scope that a grid has units for. With random masks, which the tasks of a model share, it has none for
    tasks in general with these models: no other mask was drawn."""
    models, tasks = (len({getattr(d, name) for d in grid}) >= FEWEST_UNITS for name in ("model", "task"))
    if models:
        return [Scope.BOTH if tasks else Scope.MODELS]
    return [Scope.TASKS] if tasks and not any(d.shares_masks for d in grid) else []


def _complete_grid(found: Sequence[Differences]) -> tuple[Differences, ...]:
    """Those of models that have every task, or of tasks that every model has, whichever are more; all with the same
    examples of a task."""
    usual = {task: Counter(d.questions for d in found if d.task == task).most_common(1)[0][0] for task in _tasks(found)}
    alike = [d for d in found if d.questions == usual[d.task]]
    has = {(d.model, d.task) for d in alike}
    models, tasks = {model for model, _ in has}, {task for _, task in has}
    whole_models = {model for model in models if all((model, task) in has for task in tasks)}
    whole_tasks = {task for task in tasks if all((model, task) in has for model in models)}
    if len(whole_models) * len(tasks) >= len(whole_tasks) * len(models):
        models = whole_models
    else:
        tasks = whole_tasks
    return tuple(d for d in alike if d.model in models and d.task in tasks)


def _tasks(found: Sequence[Differences]) -> list[str]:
    return list(dict.fromkeys(d.task for d in found))


def _over_examples(used: Sequence[Differences]) -> tuple[CrossedMean, str]:
    return over_columns(_blocks(used)), "over examples"


def _over_seeds(used: Sequence[Differences]) -> tuple[CrossedMean, str]:
    return over_both(_blocks(used)), "two-way by seed and example"


def _blocks(used: Sequence[Differences]) -> list[Block]:
    return [block for d in used for block in d.blocks(1 / len(used))]


def _over_models(used: Sequence[Differences]) -> tuple[CrossedMean, str]:
    """Rows are models; the tasks are blocks, which share the models and have examples of their own."""
    models, by_task = sorted({d.model for d in used}), [[d for d in used if d.task == task] for task in _tasks(used)]
    blocks = [
        replace(block, group="models", rows=models)
        for same in by_task
        for block in replace(same[0], values=_model_means(same, models)).blocks(1 / len(by_task))
    ]
    return replace(over_both(blocks), df=len(models) - 1), "two-way by model and example"


def _model_means(found: Sequence[Differences], models: Sequence[str]) -> Floats:
    """The differences of one task, (models, examples): means over seeds and backends."""
    return np.array([np.mean([d.values.mean(axis=0) for d in found if d.model == m], axis=0) for m in models])


def _over_tasks(used: Sequence[Differences]) -> tuple[CrossedMean, str]:
    return over_columns([_grid_block(used)]), "over tasks"


def _over_models_and_tasks(used: Sequence[Differences]) -> tuple[CrossedMean, str]:
    block = _grid_block(used)
    return replace(over_both([block]), df=min(block.values.shape) - 1), "two-way by model and task"


def _grid_block(used: Sequence[Differences]) -> Block:
    """The mean differences (models, tasks) as one block."""
    models, tasks, means = sorted({d.model for d in used}), sorted(_tasks(used)), defaultdict[Any, list[float]](list)
    for d in used:
        means[d.model, d.task].append(d.mean)
    grid = np.array([[np.mean(means[model, task]) for task in tasks] for model in models])
    return Block(grid, "models", models, "tasks", np.array(tasks, object), 1.0)


ESTIMATORS = {
    Scope.TRAININGS: _over_examples,
    Scope.LISTED: _over_seeds,
    Scope.TASKS: _over_tasks,
    Scope.MODELS: _over_models,
    Scope.BOTH: _over_models_and_tasks,
}


def t_estimate(found: CrossedMean, test: str, level: float, examples: int) -> Estimate:
    """The interval and p of t. Where nothing varies, those of one pair of models with so many examples."""
    test = f"{test}, t with {found.df:.0f} df"
    if found.variance > 1e-24:
        stderr = math.sqrt(found.variance)
        half = float(stats.t.ppf(0.5 + level / 2, found.df)) * stderr
        p = 2 * float(stats.t.sf(abs(found.value) / stderr, found.df))
        return Estimate(found.value, found.value - half, found.value + half, p, test)
    won, lost = (round(examples * min(max(value, 0.0), 1.0)) for value in (found.value, -found.value))
    return Estimate(found.value, *difference_interval(won, lost, examples, level), mcnemar_p(won, lost), test)
