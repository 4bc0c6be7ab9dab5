"""Simulated sweeps, whose cells share examples and base models: the tests behind findings claim a difference where
there is none as rarely as they say, and find one that is there. Tests that take cells for independent do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.read.results import Predictions
from analysis.stats.comparisons import ALL_BASES, Points, compare_values
from analysis.stats.statistics import Estimate, clustered_mean, naive_paired_t, paired_difference, repeated_measures

Bits = np.ndarray[Any, np.dtype[np.bool_]]
CELLS, EXAMPLES = 27, 100


@dataclass(frozen=True)
class World:
    """What sweeps are drawn from, in logits. Examples differ in difficulty, cells in what pruning left of them.

    effect: of the second mode. bases, examples: how much it varies between base models and between examples, about
    that. luck: of each training.
    """

    effect: float = 0.0
    bases: float = 0.0
    examples: float = 0.0
    luck: float = 0.15
    models: int = 2
    tasks: int = 3

    def sweep(self, rng: np.random.Generator) -> list[tuple[int, Bits]]:
        """Of each base its task and the answers (modes, cells, examples)."""
        found = []
        for task in range(self.tasks):
            difficulty, liking = rng.normal(0, 1.5, EXAMPLES), rng.normal(0, self.examples, EXAMPLES)
            for _ in range(self.models):
                left = np.linspace(2, -2, CELLS)[None, :, None] + difficulty
                mode = np.array([0.0, 1.0])[:, None, None]
                logit = left + mode * (self.effect + rng.normal(0, self.bases) + liking)
                logit = logit + rng.normal(0, self.luck, (2, CELLS, 1))
                found.append((task, rng.random(logit.shape) < 1 / (1 + np.exp(-logit))))
        return found


NOTHING_SHARED, EXAMPLES_SHARED = World(), World(examples=1.0, luck=0.0)
BOTH_SHARED = World(bases=0.3, examples=0.5)
NULL_WORLDS = {"nothing": NOTHING_SHARED, "examples": EXAMPLES_SHARED, "both": BOTH_SHARED}


def by_base_and_example(sweep: list[tuple[int, Bits]]) -> Estimate:
    means = [(both[1].astype(float) - both[0]).mean(axis=0) for _, both in sweep]
    bases = np.repeat(np.arange(len(sweep)), EXAMPLES)
    examples = np.concatenate([task * EXAMPLES + np.arange(EXAMPLES) for task, _ in sweep])
    return clustered_mean(np.concatenate(means), np.ones(len(bases)), bases, examples, "base")


def by_cell_and_example(sweep: list[tuple[int, Bits]]) -> Estimate:
    """Of the first base."""
    _, both = sweep[0]
    values = (both[1].astype(float) - both[0]).ravel()
    cells, examples = np.repeat(np.arange(CELLS), EXAMPLES), np.tile(np.arange(EXAMPLES), CELLS)
    return clustered_mean(values, np.ones(len(values)), cells, examples, "cell")


def paired_t_over_cells(sweep: list[tuple[int, Bits]]) -> Estimate:
    return naive_paired_t(np.concatenate([both[1].mean(axis=1) - both[0].mean(axis=1) for _, both in sweep]))


def over_examples_alone(sweep: list[tuple[int, Bits]]) -> Estimate:
    return naive_paired_t(np.concatenate([(both[1].astype(float) - both[0]).mean(axis=0) for _, both in sweep]))


def one_pair(sweep: list[tuple[int, Bits]]) -> Estimate:
    _, both = sweep[0]
    return paired_difference(both[0, 13], both[1, 13])


def claimed(world: World, test: Callable[[list[tuple[int, Bits]]], Estimate], sweeps: int) -> float:
    """The share of simulated sweeps in which the test claims a difference."""
    rng = np.random.default_rng(0)
    return sum(test(world.sweep(rng)).is_shown for _ in range(sweeps)) / sweeps


def at_most(rate: float, sweeps: int) -> float:
    """Three standard errors above a rate."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / sweeps)


each_size = pytest.mark.parametrize("sweeps", [200, pytest.param(1000, marks=pytest.mark.slow)])


@pytest.mark.parametrize("world", NULL_WORLDS.values(), ids=NULL_WORLDS)
@each_size
def test_the_claim_over_all_bases_keeps_its_rate(world: World, sweeps: int) -> None:
    assert claimed(world, by_base_and_example, sweeps) <= at_most(0.05, sweeps)


def test_it_keeps_its_rate_in_a_thousand_sweeps_with_shared_examples_and_bases() -> None:
    assert claimed(BOTH_SHARED, by_base_and_example, 1000) <= at_most(0.05, 1000)


@pytest.mark.parametrize(
    "world", [NOTHING_SHARED, EXAMPLES_SHARED, World(luck=0.4)], ids=["nothing", "examples", "luck"]
)
@each_size
def test_the_claim_for_one_base_keeps_its_rate(world: World, sweeps: int) -> None:
    assert claimed(world, by_cell_and_example, sweeps) <= at_most(0.05, sweeps)


@each_size
def test_the_claim_for_two_runs_keeps_its_rate(sweeps: int) -> None:
    assert claimed(World(luck=0.0), one_pair, sweeps) <= at_most(0.05, sweeps)


@each_size
def test_an_effect_of_known_size_is_found(sweeps: int) -> None:
    """Half a logit, six points of accuracy, under both kinds of sharing: in at least three sweeps of four."""
    world = World(effect=0.5, bases=0.3, examples=0.5)
    assert claimed(world, by_base_and_example, sweeps) >= 0.75
    assert claimed(world, by_cell_and_example, sweeps) >= 0.65


def test_its_interval_covers_the_true_difference() -> None:
    """The true difference: what modes that differ by half a logit come to over very many examples and bases."""
    world, rng = World(effect=0.5, bases=0.3, examples=0.5), np.random.default_rng(1)
    truth = np.mean([[both[1].mean() - both[0].mean() for _, both in world.sweep(rng)] for _ in range(1500)])
    found = [by_base_and_example(world.sweep(rng)) for _ in range(300)]
    covered = np.mean([e.low <= truth <= e.high for e in found])
    assert covered >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300)


def test_tests_that_take_cells_or_examples_for_independent_claim_too_much() -> None:
    """Why docs/statistics.md sends nobody to a paired t over cells."""
    assert claimed(NOTHING_SHARED, paired_t_over_cells, 200) <= at_most(0.05, 200)
    for world in (EXAMPLES_SHARED, BOTH_SHARED):
        assert claimed(world, paired_t_over_cells, 200) > 0.25
        assert claimed(world, over_examples_alone, 200) > 0.10


def test_repeated_measures_are_optimistic_where_bases_share_examples() -> None:
    def claims(sweep: list[tuple[int, Bits]]) -> bool:
        rows = [(i, mode, both[mode].mean()) for i, (_, both) in enumerate(sweep) for mode in (0, 1)]
        return repeated_measures(pd.DataFrame(rows, columns=["base", "mode", "x"]), "x", "base", "mode")[3] < 0.05

    rng = np.random.default_rng(0)
    assert np.mean([claims(EXAMPLES_SHARED.sweep(rng)) for _ in range(300)]) > at_most(0.05, 300)


def make_points(sweep: list[tuple[int, Bits]]) -> Points:
    """A simulated sweep as the report sees one."""
    rows, predictions = [], {}
    for i, (task, both) in enumerate(sweep):
        ids = np.array([f"{task} {k}" for k in range(EXAMPLES)], object)
        for mode, of_mode in zip(("sparse-to-dense", "sparse-to-sparse"), both, strict=True):
            for cell, scores in enumerate(of_mode):
                run = f"{i} {mode} {cell}"
                base = {"backend": "torch", "model": f"m{i % 2}", "task": f"t{task}", "method": "random", "seed": 0}
                rows.append(base | {"mode": mode, "sparsity": (cell + 1) / 30, "status": "done", "run_id": run})
                predictions[run] = Predictions(
                    np.array([f"t{task}"] * EXAMPLES, object), ids, scores.astype(float), run, None
                )
    return Points(pd.DataFrame(rows), predictions)


@pytest.mark.parametrize("sweeps", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_no_claim_of_a_whole_report_is_wrong_more_often_than_stated(sweeps: int) -> None:
    """Over all bases together and, corrected for how many there are, in each: without any difference anywhere."""
    rng, overall, anywhere = np.random.default_rng(0), 0, 0
    for _ in range(sweeps):
        tests = compare_values(make_points(EXAMPLES_SHARED.sweep(rng)), "mode")
        overall += any(t.is_shown for t in tests if t.about == ALL_BASES)
        anywhere += any(t.is_shown for t in tests if t.about != ALL_BASES)
    assert overall / sweeps <= at_most(0.05, sweeps)
    assert anywhere / sweeps <= at_most(0.05, sweeps)
