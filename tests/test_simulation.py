"""Simulated sweeps: each sentence is wrong as rarely as it says, and finds what is there.

tests/worlds.py has the worlds, tests/bench_claims.py runs 4,000 sweeps of each.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from bench_claims import SENTENCES, VARIED, WORLDS
from scipy import stats
from worlds import World, draw, falls_wrong, found, larger_p_wrong, wrong

from analysis.read.results import Predictions
from analysis.stats.comparisons import ALL_BASES, Points, compare_values
from analysis.stats.scopes import Scope, find_scopes

WORST = WORLDS["all of these"]


def at_most(rate: float, sweeps: int) -> float:
    """Three standard errors above a rate."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / sweeps)


@pytest.mark.parametrize("name", SENTENCES)
def test_a_sentence_is_wrong_as_rarely_as_it_says(name: str) -> None:
    """Where models, tasks, examples and seeds all vary, which no sentence may forget."""
    scope, changes = SENTENCES[name]
    assert wrong(replace(WORST, **changes), scope, 120) <= at_most(0.05, 120)


@pytest.mark.slow
@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("world", WORLDS)
def test_it_is_in_every_world(name: str, world: str) -> None:
    (scope, changes), w = SENTENCES[name], WORLDS[world]
    if not (scope is Scope.TASKS and w.mask_luck):
        assert wrong(replace(w, **changes), scope, 1000) <= at_most(0.05, 1000)


def test_random_masks_allow_no_sentence_on_tasks_in_general() -> None:
    """The tasks of a model share them: over tasks, their luck looks like an effect."""
    sweep = draw(World(mask_luck=0.3, tasks=6), np.random.default_rng(0))
    assert [scoped.scope for scoped in find_scopes(sweep.found)] == [Scope.TRAININGS]
    drawn_anew = [replace(d, shares_masks=False) for d in sweep.found]
    assert [scoped.scope for scoped in find_scopes(drawn_anew)] == [Scope.TASKS]


def test_models_and_tasks_taken_for_independent_claim_too_much() -> None:
    """What once headlined the default sweep: a t over the pairs of model and task, where effects vary by model."""
    rng, w = np.random.default_rng(0), World(by_model=1.0, models=2, tasks=3)
    means = [[d.mean for d in draw(w, rng).found] for _ in range(150)]
    assert np.mean([stats.ttest_1samp(m, 0.0).pvalue < 0.05 for m in means]) > 0.2


def test_luck_alone_makes_these_trainings_differ() -> None:
    """Why one seed gives no verdict: what is true of these trainings is often untrue of their settings."""
    w, rng = World(seed_luck=0.5), np.random.default_rng(0)
    e = [draw(w, rng).scoped(Scope.TRAININGS).estimate() for _ in range(150)]
    assert np.mean([not found.low <= 0 <= found.high for found in e]) > 0.3
    assert all(math.isnan(found.p) for found in e)


def test_half_a_logit_is_found() -> None:
    assert found(replace(VARIED, seeds=3), Scope.LISTED, 60) >= 0.6
    assert found(replace(VARIED, models=8, tasks=8), Scope.BOTH, 40) >= 0.7


def test_of_nine_falls_the_largest_is_claimed_as_rarely_as_it_says() -> None:
    """Once it had the interval of a fall that was chosen beforehand."""
    for seeds in (1, 3):
        assert falls_wrong(seeds, 0.0 if seeds == 1 else 0.15, 100) <= at_most(0.05, 100)
    assert falls_wrong(1, 0.0, 100, simultaneous=False) > 0.1


@pytest.mark.slow
def test_the_larger_p_of_models_and_of_tasks_is_too_small_where_both_vary() -> None:
    """Why the variances are added: many units of both kinds let either p forget the other kind."""
    w = replace(WORLDS["both"], models=16, tasks=16, cells=2)
    assert larger_p_wrong(w, 500) > at_most(0.05, 500)
    assert wrong(w, Scope.BOTH, 500) <= at_most(0.05, 500)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The MLE may be on the boundary")
def test_its_p_is_that_of_a_mixed_model_and_of_sign_flips() -> None:
    """8 models and 8 tasks. The mixed model takes z for t, and so its p is smaller; signs are flipped by model, which
    takes the tasks as they are, and by task, which takes the models as they are: the larger of the two is near."""
    rng, w = np.random.default_rng(0), replace(VARIED, effect=0.2, models=8, tasks=8)
    ours, mixed, flips = [], [], []
    for _ in range(25):
        sweep = draw(w, rng)
        grid = np.array([d.mean for d in sweep.found]).reshape(8, 8)
        ours.append(sweep.scoped(Scope.BOTH).estimate().p)
        mixed.append(mixed_model_p(grid))
        flips.append(max(sign_flip_p(grid.mean(axis=axis)) for axis in (0, 1)))
    ours_z = 2 * stats.norm.sf(stats.t.isf(np.array(ours) / 2, 7))
    assert np.median(np.abs(ours_z - mixed)) < 0.01
    assert stats.spearmanr(ours, flips)[0] > 0.9
    assert np.mean(np.array(ours) >= np.array(flips) - 0.02) > 0.9


def mixed_model_p(grid: np.ndarray) -> float:
    """Crossed random effects of models and tasks, by restricted maximum likelihood (statsmodels)."""
    import statsmodels.formula.api as smf

    rows = [(m, t, value) for (m, t), value in np.ndenumerate(grid)]
    table = pd.DataFrame(rows, columns=["model", "task", "d"]).assign(all=1)
    parts = {"model": "0 + C(model)", "task": "0 + C(task)"}
    fit = smf.mixedlm("d ~ 1", table, groups="all", vc_formula=parts).fit(reml=True)
    return float(fit.pvalues["Intercept"])


def sign_flip_p(means: np.ndarray) -> float:
    """The p of all flips of the units' signs."""
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(means))).reshape(len(means), -1)
    return float(np.mean(np.abs(means @ signs) >= abs(means.sum()) - 1e-12))


def make_points(w: World, rng: np.random.Generator) -> Points:
    """A simulated sweep as the report sees one: answers without any difference between the modes."""
    rows, predictions = [], {}
    for m, t, seed, cell, mode in np.ndindex(w.models, w.tasks, w.seeds, w.cells, 2):
        run = f"{m} {t} {seed} {cell} {mode}"
        base = {"backend": "torch", "model": f"m{m}", "task": f"t{t}", "method": "unstructured", "protocol_id": "p"}
        mode_name = ("sparse-to-dense", "sparse-to-sparse")[mode]
        rows.append(base | {"seed": seed, "mode": mode_name, "sparsity": (cell + 1) / 10, "status": "done"})
        rows[-1] |= {"schedule": "one-shot", "comparable": True}
        rows[-1]["run_id"] = run
        tasks, ids = np.full(w.examples, f"t{t}", object), np.array([f"{t} {k}" for k in range(w.examples)], object)
        predictions[run] = Predictions(tasks, ids, (rng.random(w.examples) < 0.7).astype(float), run, None)
    return Points(pd.DataFrame(rows), predictions)


@pytest.mark.parametrize("sweeps", [3, pytest.param(300, marks=pytest.mark.slow)])
def test_no_claim_of_a_whole_report_is_wrong_more_often_than_stated(sweeps: int) -> None:
    """Over all bases together and, corrected for how many there are, in each."""
    rng, overall, anywhere = np.random.default_rng(0), 0, 0
    for _ in range(sweeps):
        tests = compare_values(make_points(World(seeds=3, cells=2), rng), "mode")
        overall += any(t.is_shown for t in tests if t.about == ALL_BASES)
        anywhere += any(t.is_shown for t in tests if t.about != ALL_BASES)
        assert {t.scope for t in tests} == {Scope.LISTED}
    assert overall / sweeps <= at_most(0.05, sweeps)
    assert anywhere / sweeps <= at_most(0.05, sweeps)
