"""Each statistic against a textbook example, a formula written out, or a case without doubt."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.stats.statistics import (
    anova,
    holm,
    paired_difference,
    seeds_sentence,
    smallest_shown,
    wilson,
)

SLEEP = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
"""Student's (1908) extra hours of sleep under two drugs: t = 4.0621 with 9 df, p = 0.002833."""
PLANTS = {
    "ctrl": [4.17, 5.58, 5.18, 6.11, 4.50, 4.61, 5.17, 4.53, 5.33, 5.14],
    "trt1": [4.81, 4.17, 4.41, 3.59, 5.87, 3.83, 6.03, 4.89, 4.32, 4.69],
    "trt2": [6.31, 5.12, 5.54, 5.50, 5.37, 5.29, 4.92, 6.15, 5.80, 5.26],
}
"""Dobson's (1983) PlantGrowth: F(2, 27) = 4.846, p = 0.01591, sums of squares 3.76634 and 10.49209."""


def counts(both: int, lost: int, won: int, neither: int) -> tuple[list[bool], list[bool]]:
    """(before, after) answers with this table."""
    before = [True] * (both + lost) + [False] * (won + neither)
    after = [True] * both + [False] * lost + [True] * won + [False] * neither
    return before, after


def test_mcnemar_is_the_binomial_test_of_the_discordant_examples() -> None:
    found = paired_difference(*counts(both=794, lost=86, won=150, neither=570))
    assert found.value == pytest.approx(64 / 1600)
    assert found.p == pytest.approx(3.716e-05, rel=1e-3)  # Agresti (1990), p. 350, exact
    few = paired_difference(*counts(5, 1, 6, 0))
    assert few.p == pytest.approx(2 * (1 + 7) / 2**7)


def test_the_interval_of_a_difference_is_bonett_and_prices() -> None:
    found = paired_difference(*counts(both=53, lost=16, won=8, neither=9))
    p_won, p_lost, n = 9 / 88, 17 / 88, 88
    half = 1.959964 * math.sqrt((p_won + p_lost - (p_won - p_lost) ** 2) / n)
    assert (found.low, found.high) == (pytest.approx(-8 / 88 - half), pytest.approx(-8 / 88 + half))


def test_models_that_answer_alike_show_no_difference_and_no_certainty() -> None:
    found = paired_difference([True] * 100, [True] * 100)
    assert (found.value, found.p) == (0.0, 1.0)
    assert found.low < 0 < found.high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_turning_a_pair_turns_its_difference(pairs: list[tuple[bool, bool]]) -> None:
    before, after = zip(*pairs, strict=True)
    there, back = paired_difference(before, after), paired_difference(after, before)
    assert there.p == back.p
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert 0 <= there.p <= 1


def test_wilsons_interval() -> None:
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))  # Newcombe (1998)
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert wilson(29, 29)[1] == 1.0


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_one_way_anova_is_dobsons() -> None:
    rows = [(group, weight) for group, weights in PLANTS.items() for weight in weights]
    table = anova(pd.DataFrame(rows, columns=["group", "weight"]), "weight", ["group"]).set_index("factor")
    assert table.loc["group", "F"] == pytest.approx(4.846, abs=1e-3)
    assert table.loc["group", "p"] == pytest.approx(0.01591, abs=1e-5)
    assert table.loc["group", "eta_squared"] == pytest.approx(3.76634 / 14.25843, abs=1e-5)
    error = 10.49209 / 27
    assert table.loc["group", "omega_squared"] == pytest.approx((3.76634 - 2 * error) / (14.25843 + error), abs=1e-5)


def test_more_examples_show_smaller_differences() -> None:
    assert smallest_shown(200) == pytest.approx(2.8016 * math.sqrt(0.1 / 200), rel=1e-4)
    assert smallest_shown(800) == pytest.approx(smallest_shown(200) / 2)


def test_seeds_are_spoken_of() -> None:
    assert "say nothing of other trainings" in seeds_sentence(1)
    assert "With 2 seeds, differences are described for these trainings" in seeds_sentence(2)
    assert "With 3 seeds" in seeds_sentence(3)
    assert "below about 2.3 of its standard deviations" in seeds_sentence(3)  # t(0.975, 4) sqrt(2/3) = 2.776 * 0.816


def test_a_p_that_is_no_test_is_not_corrected_and_counts_for_none() -> None:
    assert holm([0.01, math.nan, 0.04])[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(holm([0.01, math.nan, 0.04])[1])
