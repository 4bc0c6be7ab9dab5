"""Simulated sweeps whose truth is known, and how often the sentence of a scope is wrong about it.

A world says in logits what answers are made of. Each example has its difficulty, each cell what pruning left of it; the
second mode is better by an effect that may vary between models, between tasks and between examples; each training has
its luck. Half of an effect is added to one mode and half taken from the other, so that without an effect nothing tells
the modes apart. A sentence is wrong where its interval leaves out the truth of its scope: what the mean difference
comes to if whatever the scope draws is drawn very often, and the rest is as it is in this sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from analysis.read.results import Predictions
from analysis.stats.paired import LEVEL
from analysis.stats.scopes import Differences, Scope, Scoped, find_scopes
from analysis.stats.statistics import paired_difference

Floats = np.ndarray[Any, np.dtype[np.float64]]
DIFFICULTY = 1.5
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


@dataclass(frozen=True)
class World:
    """What sweeps are drawn from, in logits: standard deviations, but for the effect itself."""

    effect: float = 0.0
    by_model: float = 0.0
    by_task: float = 0.0
    by_example: float = 0.0
    """how much an example suits one mode, in every cell of its task"""
    luck: float = 0.15
    """of each training"""
    seed_luck: float = 0.0
    """of all trainings of one model, task and seed"""
    mask_luck: float = 0.0
    """of all trainings of one model and seed, as random masks bring it"""
    models: int = 2
    tasks: int = 3
    seeds: int = 1
    cells: int = 6
    examples: int = 100


@dataclass(frozen=True)
class Sweep:
    """One sweep of a world: what its answers differ by, and the effects and luck that they were drawn with."""

    world: World
    found: list[Differences]
    by_model: Floats
    by_task: Floats
    luck: Floats
    """(modes, models, tasks, seeds, cells)"""

    def truth(self, scope: Scope) -> float:
        """The mean difference where what the scope draws is drawn very often."""
        w = self.world
        effect, variance = np.full((w.models, w.tasks), w.effect), DIFFICULTY**2 + w.by_example**2 / 2
        if scope in (Scope.MODELS, Scope.BOTH):
            variance += w.by_model**2 / 4
        else:
            effect = effect + self.by_model[:, None]
        if scope in (Scope.TASKS, Scope.BOTH):
            variance += w.by_task**2 / 4
        else:
            effect = effect + self.by_task
        logits = _apart(effect[:, :, None, None]) + _left(w)
        if scope is Scope.TRAININGS:
            logits = logits + self.luck
        else:
            variance += w.luck**2 + w.seed_luck**2 + w.mask_luck**2
        accuracies = expit(logits[..., None] + np.sqrt(variance) * NODES) @ (WEIGHTS / WEIGHTS.sum())
        return float(accuracies[1].mean() - accuracies[0].mean())

    def scoped(self, scope: Scope) -> Scoped:
        return next(scoped for scoped in find_scopes(self.found) if scoped.scope is scope)

    def is_wrong(self, scope: Scope) -> bool:
        e = self.scoped(scope).estimate()
        return not e.low <= self.truth(scope) <= e.high


def draw(w: World, rng: np.random.Generator) -> Sweep:
    shape = (2, w.models, w.tasks, w.seeds, w.cells)
    by_model, by_task = rng.normal(0, w.by_model, w.models), rng.normal(0, w.by_task, w.tasks)
    luck = rng.normal(0, w.luck, shape) + rng.normal(0, w.seed_luck, (*shape[:4], 1))
    luck = luck + rng.normal(0, w.mask_luck, (2, w.models, 1, w.seeds, 1))
    liking = rng.normal(0, w.by_example / np.sqrt(2), (2, w.tasks, w.examples))
    difficulty = rng.normal(0, DIFFICULTY, (w.tasks, w.examples))
    logits = _apart((w.effect + by_model[:, None] + by_task)[:, :, None, None]) + _left(w) + luck
    logits = logits[..., None] + (liking + difficulty)[:, None, :, None, None]
    right = rng.random(logits.shape, dtype=np.float32) < expit(logits.astype(np.float32))
    values = right[1].mean(axis=3) - right[0].mean(axis=3)
    return Sweep(w, _as_differences(w, values), by_model, by_task, luck)


def wrong(world: World, scope: Scope, sweeps: int, seed: int = 18) -> float:
    """The share of sweeps in which the sentence of a scope is wrong."""
    rng = np.random.default_rng(seed)
    return sum(draw(world, rng).is_wrong(scope) for _ in range(sweeps)) / sweeps


def found(world: World, scope: Scope, sweeps: int, seed: int = 18) -> float:
    """The share of sweeps in which the sentence of a scope claims that the second mode is better."""
    rng = np.random.default_rng(seed)
    return sum(draw(world, rng).scoped(scope).estimate().low > 0 for _ in range(sweeps)) / sweeps


def _left(w: World) -> Floats:
    """What pruning left of each cell."""
    return np.linspace(1.5, -1.5, w.cells)


def _apart(effect: Floats) -> Floats:
    """Of each mode what the effect brings it."""
    return np.stack([-effect / 2, effect / 2])


def _as_differences(w: World, values: Floats) -> list[Differences]:
    """values: (models, tasks, seeds, examples)"""
    known = [
        Predictions(np.full(w.examples, f"t{t}", object), np.arange(w.examples), np.zeros(w.examples), "", None)
        for t in range(w.tasks)
    ]
    seeds, pairs = tuple(range(w.seeds)), w.seeds * w.cells
    return [
        Differences("torch", f"m{m}", f"t{t}", seeds, values[m, t], known[t], pairs, (), w.mask_luck > 0)
        for m in range(w.models)
        for t in range(w.tasks)
    ]


def falls_wrong(seeds: int, luck: float, sweeps: int, simultaneous: bool = True, steps: int = 9) -> float:
    """The share of curves without any fall in which the largest fall of `steps` is claimed: its interval is below 0."""
    rng, claimed = np.random.default_rng(18), 0
    level = 1 - (1 - LEVEL) / steps if simultaneous else LEVEL
    known = Predictions(np.full(100, "t", object), np.arange(100), np.zeros(100), "", None)
    for _ in range(sweeps):
        logits = rng.normal(0, DIFFICULTY, 100) + rng.normal(0, luck, (steps + 1, seeds, 1)) + 1
        right = rng.random((steps + 1, seeds, 100)) < expit(logits)
        values = np.diff(right.astype(float), axis=0)
        at = int(values.mean(axis=(1, 2)).argmin())
        if seeds == 1:
            e = paired_difference(right[at, 0], right[at + 1, 0], level)
        else:
            fall = Differences("torch", "m", "t", tuple(range(seeds)), values[at], known, seeds)
            e = Scoped(Scope.LISTED, (fall,)).estimate(level)
        claimed += e.high < 0
    return claimed / sweeps


def larger_p_wrong(world: World, sweeps: int) -> float:
    """How often the larger p of plain t tests, over means of models and over means of tasks, claims for both in
    general."""
    rng, claimed = np.random.default_rng(18), 0
    for _ in range(sweeps):
        means = np.array([d.mean for d in draw(world, rng).found]).reshape(world.models, world.tasks)
        claimed += max(stats.ttest_1samp(means.mean(axis=axis), 0.0).pvalue for axis in (0, 1)) < 0.05
    return claimed / sweeps
