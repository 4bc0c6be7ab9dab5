"""How far a difference may be claimed follows from how many seeds, models and tasks there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from worlds import World, draw

from analysis.read.results import Predictions
from analysis.stats.scopes import Differences, Scope, Scoped, find_scopes


def difference(
    model: str = "m", task: str = "t", seeds: int = 1, values: Any = None, examples: int = 50
) -> Differences:
    known = Predictions(np.full(examples, task, object), np.arange(examples), np.zeros(examples), "", None)
    drawn = np.random.default_rng(len(model + task)).integers(-1, 2, (seeds, examples)).astype(float)
    return Differences("torch", model, task, tuple(range(seeds)), drawn if values is None else values, known, seeds)


def scopes(models: int, tasks: int, seeds: int) -> list[Scope]:
    found = [difference(f"m{m}", f"t{t}", seeds) for m in range(models) for t in range(tasks)]
    return [scoped.scope for scoped in find_scopes(found)]


@pytest.mark.parametrize(
    ("models", "tasks", "seeds", "expected"),
    [
        (2, 3, 1, [Scope.TRAININGS]),
        (2, 3, 2, [Scope.TRAININGS]),
        (2, 3, 3, [Scope.LISTED]),
        (5, 3, 1, [Scope.MODELS]),
        (4, 5, 1, [Scope.TASKS]),
        (5, 5, 1, [Scope.BOTH]),
        (5, 5, 3, [Scope.BOTH, Scope.LISTED]),
    ],
)
def test_below_its_count_a_scope_is_not_claimed(models: int, tasks: int, seeds: int, expected: list[Scope]) -> None:
    assert scopes(models, tasks, seeds) == expected


def test_nothing_has_no_scope() -> None:
    assert find_scopes([]) == []


def test_a_verdict_for_what_is_listed_uses_what_has_three_seeds() -> None:
    [scoped] = find_scopes([difference("a", seeds=3), difference("b", seeds=1)])
    assert (scoped.scope, scoped.models, scoped.seeds) == (Scope.LISTED, ["a"], 3)


def test_general_claims_take_models_that_have_every_task() -> None:
    grid = [difference(f"m{m}", f"t{t}") for m in range(6) for t in range(5)]
    [scoped] = find_scopes([d for d in grid if (d.model, d.task) != ("m0", "t4")])
    assert (scoped.scope, scoped.models) == (Scope.BOTH, ["m1", "m2", "m3", "m4", "m5"])


def test_models_that_answered_other_questions_are_no_units() -> None:
    found = [difference(f"m{m}") for m in range(5)]
    assert find_scopes(found)[0].scope is Scope.MODELS
    other = difference("m5", examples=40)
    assert "m5" not in find_scopes([*found, other])[0].models


def test_over_tasks_it_is_students_t_of_their_means() -> None:
    sweep = draw(World(effect=0.5, by_task=0.3, tasks=6), np.random.default_rng(0))
    found = sweep.scoped(Scope.TASKS).estimate()
    means = np.array([d.mean for d in sweep.found]).reshape(2, 6).mean(axis=0)
    t = stats.ttest_1samp(means, 0.0)
    assert (found.value, found.p) == (pytest.approx(means.mean()), pytest.approx(t.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(t.confidence_interval()))


def test_over_both_its_p_is_not_below_the_larger_of_models_and_of_tasks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sweep = draw(World(effect=0.3, by_model=0.3, by_task=0.3, models=5, tasks=6), rng)
        means = np.array([d.mean for d in sweep.found]).reshape(5, 6)
        larger = max(stats.ttest_1samp(means.mean(axis=axis), 0.0).pvalue for axis in (0, 1))
        assert sweep.scoped(Scope.BOTH).estimate().p >= larger - 1e-12


def test_where_no_answer_differs_the_interval_is_not_empty() -> None:
    """Once two settings were headlined as "-0.150 (-0.150 to -0.150, p < 0.001)"."""
    for seeds in (1, 3):
        found = difference(seeds=seeds, values=np.zeros((seeds, 50)))
        [scoped] = find_scopes([found])
        e = scoped.estimate()
        assert e.low < e.value == 0 < e.high
        assert not e.p < 0.05


def test_examples_of_a_mixture_count_by_task() -> None:
    tasks = np.array(["a"] * 10 + ["b"] * 40, object)
    known = Predictions(tasks, np.arange(50), np.zeros(50), "", None)
    values = np.where(tasks == "a", 1.0, 0.0)[None]
    e = Scoped(Scope.TRAININGS, (replace(difference(), values=values, predictions=known),)).estimate()
    assert e.value == pytest.approx(0.5)


def test_how_many_agree_is_counted_by_the_sign_of_the_mean() -> None:
    up, down = (np.full((3, 50), value) for value in (0.4, -0.1))
    [scoped] = find_scopes([difference(name, seeds=3, values=v) for name, v in (("a", up), ("b", up), ("c", down))])
    assert (scoped.agreeing, len(scoped.used)) == (2, 3)
