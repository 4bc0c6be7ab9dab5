from __future__ import annotations

import random
from math import comb
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from simulated_races import race_of_equals

from analysis.stats.statistics import paired_difference
from tune_sparse.search.racing import (
    LEVEL_OF_BEST,
    LEVEL_OF_FRONT,
    STAGES,
    Correctness,
    Race,
    accuracy_difference,
    cut_stages,
    discordant_counts,
    hypervolume,
    most_divisive_first,
    p_value,
    pareto_front,
)

marks_texts = st.text("01-", min_size=1, max_size=30)


@given(text=marks_texts)
def test_correctness_is_what_was_written(text: str) -> None:
    correctness = Correctness.from_text(text)
    assert str(correctness) == text
    assert correctness.count == len(text) - text.count("-")
    assert correctness.is_complete == ("-" not in text)
    assert str(Correctness(len(text)).adding((i, c == "1") for i, c in enumerate(text) if c != "-")) == text


def test_only_examples_that_both_answered_are_compared() -> None:
    a, b = Correctness.from_text("1101-1"), Correctness.from_text("0110-0")
    assert discordant_counts(a, b) == (3, 1)
    assert discordant_counts(Correctness.from_text("11--"), Correctness.from_text("--00")) == (0, 0)
    assert Correctness.from_text("110-").accuracy == pytest.approx(2 / 3)


@given(wins=st.integers(0, 40), losses=st.integers(0, 40))
def test_the_p_value_is_the_binomial_tail(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
    assert p_value(wins, losses) == pytest.approx(expected)


def test_the_interval_is_centred_on_the_paired_difference() -> None:
    mean, low, high = accuracy_difference(
        Correctness.from_text("1" * 60 + "0" * 40), Correctness.from_text("1" * 50 + "0" * 40 + "1" * 10)
    )
    assert mean == 0.0
    assert -low == high == pytest.approx(1.96 * (22**0.5) / 102, rel=1e-4), "one win and one loss more, of two more"


def test_racing_and_the_report_state_one_interval() -> None:
    a, b = "1101110111", "1011111000"
    before, after = ([c == "1" for c in text] for text in (b, a))
    found = paired_difference(before, after)
    assert accuracy_difference(Correctness.from_text(a), Correctness.from_text(b)) == (
        pytest.approx(found.value),
        found.low,
        found.high,
    )


@given(wins=st.integers(0, 60), losses=st.integers(0, 60))
def test_racing_stops_whom_the_binomial_tail_written_out_stops(wins: int, losses: int) -> None:
    tail = sum(comb(wins + losses, k) for k in range(wins, wins + losses + 1)) / 2 ** (wins + losses)
    assert all((p_value(wins, losses) <= level) == (tail <= level) for level in (LEVEL_OF_FRONT, LEVEL_OF_BEST))


def test_of_equal_points_a_front_has_the_first_or_all() -> None:
    points = {"b": (0.5, 1.0), "a": (0.5, 1.0), "dear": (0.5, 2.0), "best": (0.7, 3.0)}
    assert pareto_front(points) == ["a", "best"]
    assert pareto_front(points, keep_equal=True) == ["a", "b", "best"]
    assert pareto_front({}) == []


def test_examples_that_divide_candidates_are_asked_first() -> None:
    answered = [Correctness.from_text(text) for text in ("1110", "1100", "1101", "1111")]
    order = most_divisive_first(answered, 4, seed=0)
    assert set(order[:2]) == {2, 3}
    assert sorted(order) == [0, 1, 2, 3]
    assert order == most_divisive_first(answered, 4, seed=0)


@given(n=st.integers(1, 300))
def test_stages_are_all_examples_once_and_none_is_empty(n: int) -> None:
    stages = cut_stages(list(range(n)))
    assert [i for stage in stages for i in stage] == list(range(n))
    assert all(stages)
    assert len(stages) <= len(STAGES)


def race(minimises_cost: bool = True, **candidates: tuple[float, str]) -> Race:
    found = Race(12, minimises_cost)
    for key, (cost, text) in candidates.items():
        found.update(key, cost, Correctness.from_text(text))
    return found


def test_a_candidate_is_beaten_only_by_one_that_costs_no_more() -> None:
    good, bad = "111111111111", "00000-------"
    assert race(good=(2, good), bad=(2, bad)).beaten_by("bad") == "good"
    assert race(good=(3, good), bad=(2, bad)).beaten_by("bad") is None
    assert race(False, good=(3, good), bad=(2, bad)).beaten_by("bad") == "good"
    assert race(good=(1, "111---------"), bad=(2, "000000000000")).beaten_by("bad") is None, "3 wins: p = 0.125"


def test_what_a_beaten_candidate_lost_is_taken_off_its_beater() -> None:
    found = race(good=(1, "111111111100"), bad=(2, "01000-------"))
    assert found.beaten_by("bad") == "good"
    assert found.estimate("bad", "good") == pytest.approx(10 / 12 - 4 / 12)
    assert found.estimate("good", None) == pytest.approx(10 / 12)


def test_the_front_has_complete_candidates_that_none_beats_in_both() -> None:
    found = race(
        cheap=(1, "110000000000"),
        same=(1.5, "110000000000"),
        middle=(2, "111111111000"),
        partial=(2, "1111111-----"),
        dear=(3, "111111111100"),
    )
    assert found.front() == ["cheap", "middle", "dear"]
    assert found.winner() == "middle", "one example is within one paired standard error"
    found.minimises_cost = False
    assert found.winner() == "dear"


def test_the_winner_of_a_front_of_one_is_it() -> None:
    assert race(only=(1, "000000000000")).winner() == "only"


def test_the_hypervolume_is_the_dominated_area() -> None:
    assert hypervolume([(0.9, 0.5), (0.6, 0.2), (0.5, 0.9)], (0.5, 1.0)) == pytest.approx(0.1 * 0.8 + 0.3 * 0.5)
    assert hypervolume([(0.4, 0.1), (0.9, 1.0)], (0.5, 1.0)) == 0.0


def test_racing_finds_the_best_of_many_with_a_fraction_of_the_answers() -> None:
    rng, spent, n, kinds = random.Random(0), 0, 400, 60
    hard = [rng.random() < 0.3 for _ in range(n)]
    texts = ["".join("1" if not h or rng.random() < k / kinds else "0" for h in hard) for k in range(kinds)]
    rng.shuffle(texts)
    found, stages = Race(n, False), [list(range(n))]
    for k, text in enumerate(texts):
        if len(found.complete()) == 8 and len(stages) == 1:
            stages = cut_stages(most_divisive_first([found.correctness[key] for key in found.complete()], n, 0))
        correctness = Correctness(n)
        for stage in stages:
            correctness, spent = correctness.adding((i, text[i] == "1") for i in stage), spent + len(stage)
            found.update(str(k), 0, correctness)
            if not correctness.is_complete and found.beaten_by(str(k)):
                break
    assert found.correctness[found.winner()].accuracy >= max(t.count("1") for t in texts) / n - 0.0025
    assert spent < 0.4 * n * kinds


@pytest.mark.parametrize(("minimises_cost", "stopped"), [(True, 0.65), (False, 0.90)])
def test_racing_is_a_lenient_rule_that_stops_most_that_are_as_good(minimises_cost: bool, stopped: float) -> None:
    races = [race_of_equals(minimises_cost, seed) for seed in range(20)]
    assert fmean(race.equal_fraction for race in races) == pytest.approx(stopped, abs=0.04), "docs/search.md says so"


def test_an_interval_is_not_empty_where_no_answer_differs() -> None:
    same = Correctness.from_text("1101110111")
    difference, low, high = accuracy_difference(same, same)
    assert difference == 0.0
    assert low < 0.0 < high
