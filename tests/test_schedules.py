"""The formulas by which schedules plan their updates."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_sparse.config import schedule_settings
from tune_sparse.config.schedule_settings import ScheduleSettings
from tune_sparse.schedules import CURVES, DROP_CURVES, SCHEDULES

USUAL = ScheduleSettings()
GRADUAL, RIGL = SCHEDULES["gradual"], SCHEDULES["rigl"]


@pytest.mark.parametrize("steps", [*range(4, 200), *range(200, 10_000, 97)])
def test_gradual_pruning_has_distinct_steps_after_its_warm_up_the_last_where_its_final_phase_begins(steps: int) -> None:
    first, last = max(1, math.floor(0.15 * steps)), math.floor(0.85 * steps)
    at = [update.step for update in GRADUAL.plan(USUAL, 0.5, steps)]
    assert len(at) == min(10, last - first)
    assert all(earlier < later for earlier, later in pairwise([first, *at]))
    assert at[-1] == last


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1000, list(range(220, 851, 70))), (20, [4, 6, 7, 9, 10, 11, 13, 14, 16, 17]), (4, [2, 3])],
)
def test_the_steps_of_gradual_pruning_by_hand(steps: int, expected: list[int]) -> None:
    assert [update.step for update in GRADUAL.plan(USUAL, 0.5, steps)] == expected


@pytest.mark.parametrize("curve", CURVES)
@given(target=st.floats(0.001, 0.999), updates=st.integers(1, 30), steps=st.integers(10, 10_000))
def test_sparsity_rises_to_exactly_its_target_along_every_curve(
    curve: str, target: float, updates: int, steps: int
) -> None:
    settings = replace(USUAL, gradual_curve=curve, gradual_updates=updates)
    rising = [update.sparsity for update in GRADUAL.plan(settings, target, steps)]
    assert all(0 <= low < high for low, high in pairwise([0.0, *rising]))
    assert rising[-1] == target


@pytest.mark.parametrize(
    ("curve", "expected"),
    [("linear", [0.225, 0.45, 0.675, 0.9]), ("cubic", [0.5203125, 0.7875, 0.8859375, 0.9])],
)
def test_the_sparsities_on_a_curve_by_hand(curve: str, expected: list[float]) -> None:
    settings = replace(USUAL, gradual_curve=curve, gradual_updates=4)
    assert [update.sparsity for update in GRADUAL.plan(settings, 0.9, 100)] == pytest.approx(expected)


def test_on_the_exponential_curve_each_update_prunes_the_same_fraction_of_what_is_left() -> None:
    settings = replace(USUAL, gradual_curve="exponential", gradual_updates=4)
    kept = [1.0, *(1 - update.sparsity for update in GRADUAL.plan(settings, 0.9, 100))]
    assert [later / earlier for earlier, later in pairwise(kept)] == pytest.approx([0.1**0.25] * 4)


@given(
    steps=st.integers(1, 5_000),
    every=st.integers(1, 200),
    begin=st.floats(0, 0.5),
    end=st.floats(0.5, 1),
    drop=st.floats(0.01, 0.99),
)
def test_regrowing_updates_are_multiples_apart_with_an_end_that_is_excluded_and_a_falling_drop(
    steps: int, every: int, begin: float, end: float, drop: float
) -> None:
    settings = replace(USUAL, update_every=every, update_from=begin, update_to=end, drop_fraction=drop)
    updates = RIGL.plan(settings, 0.9, steps)
    first, last = math.floor(begin * steps), math.floor(end * steps)
    assert [update.step for update in updates] == [t for t in range(first + 1, last) if (t - first) % every == 0]
    assert {update.sparsity for update in updates} <= {0.9}
    for update in updates:
        assert update.drop_fraction == pytest.approx(drop / 2 * (1 + math.cos(math.pi * update.step / last)))
    assert all(high.drop_fraction > low.drop_fraction for high, low in pairwise(updates))


def test_set_and_rigl_update_masks_at_the_same_steps_of_model_zoos_configuration() -> None:
    settings = replace(USUAL, drop_curve="constant")
    updates = RIGL.plan(settings, 0.75, 4778)
    assert updates == SCHEDULES["set"].plan(settings, 0.75, 4778)
    assert [update.step for update in updates] == list(range(100, 3583, 100))
    assert {update.drop_fraction for update in updates} == {0.3}


@pytest.mark.parametrize("name", ["one-shot", "iterative"])
def test_other_schedules_update_no_mask_within_a_training(name: str) -> None:
    assert SCHEDULES[name].plan(USUAL, 0.5, 1000) == []


def test_every_curve_is_described() -> None:
    assert schedule_settings.CURVES.keys() == CURVES.keys()
    assert schedule_settings.DROP_CURVES.keys() == DROP_CURVES.keys()


def test_a_schedule_has_a_value_for_each_setting_that_it_reads() -> None:
    for facts in SCHEDULES.values():
        assert facts.defaults.keys() <= set(facts.settings)
        unset = {name for name, value in facts.read(USUAL).items() if value is None}
        assert unset <= {"levels", "steps_per_level"}
