"""The choice of the next run, without Ray: bisection of one curve, and many curves in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_sparse.config.spending import FindRule
from tune_sparse.ledger.curves import KEY, Bracket, Curve, Score, bracket_of, curves_of
from tune_sparse.sweep import find
from tune_sparse.sweep.find import Finder, next_level

NINE = tuple(level / 10 for level in range(1, 10))
RULE = FindRule(0.10, None)
MODES = ("sparse-to-dense", "sparse-to-sparse")


def bisected(answer: int, gap: int = 1, hint: int | None = None, failed: Iterable[int] = ()) -> Bracket:
    """The end of a curve whose highest passing place is `answer`."""
    bracket = Bracket(NINE, {}, frozenset())
    broken = set(failed)
    for _ in range(20):
        place = next_level(bracket, gap, hint)
        if place is None:
            return bracket
        known = {} if place in broken else {place: place <= answer}
        bracket = Bracket(NINE, {**bracket.passes, **known}, bracket.failed | ({place} & broken))
    raise AssertionError("it never ends")


@given(st.integers(-1, 8), st.integers(1, 4), st.none() | st.integers(-1, 8))
def test_every_answer_is_bracketed_whatever_the_hint(answer: int, gap: int, hint: int | None) -> None:
    bracket = bisected(answer, gap, hint)
    assert bracket.is_decided(gap)
    assert bracket.low <= answer < bracket.high
    assert len(bracket.passes) <= 6
    assert gap > 1 or bracket.middle == answer


def test_a_right_hint_needs_two_runs_and_a_bracket_of_three_no_more_without() -> None:
    assert [len(bisected(answer, 1, answer).passes) for answer in range(-1, 9)] == [1, *[2] * 8, 1]
    assert max(len(bisected(answer, 3).passes) for answer in range(-1, 9)) == 3
    assert sum(len(bisected(answer, 3).passes) for answer in range(-1, 9)) == 23


def test_levels_around_a_failed_training_are_measured_and_the_curve_says_so() -> None:
    bracket = bisected(4, failed=[4, 5])
    assert not bracket.is_decided(1)
    assert bracket.text() == "passes 0.4, fails 0.7 (2 runs); cannot be decided at 0.5 and 0.6: no result there"
    assert bisected(4, gap=3, failed=[4]).is_decided(3)


def curves(tasks: int = 2, levels: tuple[float, ...] = NINE, seeds: int = 1) -> list[Curve]:
    cells = []
    for task, mode, method, seed, level in product(range(tasks), MODES, "ab", range(seeds), (0.0, *levels)):
        values = ("torch", "m", f"t{task}", method, mode, "one-shot", seed)
        run = f"t{task} {method} {mode.removeprefix('sparse-')} {level:g} {seed}" if level else f"t{task} none {seed}"
        cells.append(dict(zip(KEY, values, strict=True)) | {"sparsity": level, "run_id": run})
    return curves_of(cells)


@dataclass
class Sweep:
    """Runs what a finder asks for, with so many workers; the oldest run ends first."""

    scores: Callable[[str], Score | None]
    ended: dict[str, Score | None] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def run(self, finder: Finder, most: int = 1000, workers: int = 1) -> Finder:
        running: list[str] = []
        for _ in range(most):
            while len(running) < workers and (run := finder.next()):
                finder.started(run)
                running.append(run)
                self.order.append(run)
            if not running:
                break
            ended = running.pop(0)
            self.ended[ended] = self.scores(ended)
            finder.ended(ended, self.ended[ended])
        return finder


def cliff(run: str, at: float = 0.5) -> Score:
    """Passes up to `at`; before the last mask a level more."""
    level = float(run.split()[3]) if "none" not in run else 0.0
    return Score(0.9 if level <= at + 1e-9 else 0.4, before_merge=0.9 if level <= at + 0.1 + 1e-9 else 0.4)


def test_dense_runs_come_first_then_compared_levels_then_each_model_and_task_in_turn() -> None:
    sweep = Sweep(cliff)
    finder = sweep.run(Finder(curves(), RULE, 1, [0.7]))
    assert sweep.order[:3] == ["t0 none 0", "t1 none 0", "t0 a to-dense 0.7 0"]
    assert all(" 0.7 " in run for run in sweep.order[2:10])
    assert [run.split()[:3] for run in sweep.order[10:13]] == [["t0", "a", "to-dense"]] * 3, "until it is decided"
    assert sweep.order[13].startswith("t1 a to-dense"), "not the rest of the first task"
    assert {bracket.text() for bracket in finder.brackets} == {"passes 0.5, fails 0.6 (4 runs)"} | {
        "passes 0.5, fails 0.6 (3 runs)"
    }
    assert all(finder.is_decided(number) for number in range(8))


def test_a_curve_begins_at_the_answer_of_another_and_of_its_twin_before_the_last_mask() -> None:
    sweep = Sweep(cliff)
    sweep.run(Finder(curves(tasks=1), RULE))
    first = {}
    for run in sweep.order[1:]:
        first.setdefault(tuple(run.split()[1:3]), run.split()[3])
    by_mode = {name: {at for (_, mode), at in first.items() if mode == name} for name in ("to-dense", "to-sparse")}
    assert by_mode == {"to-dense": {"0.5"}, "to-sparse": {"0.6"}}


def test_without_axes_each_seed_is_a_curve_of_its_own() -> None:
    sweep = Sweep(lambda run: cliff(run, 0.5 if run.endswith("0") else 0.7))
    finder = sweep.run(Finder(curves(tasks=1, seeds=2), RULE))
    assert [bracket.low for bracket in finder.brackets] == [NINE.index(0.5), NINE.index(0.7)] * 4


def test_one_run_of_a_curve_at_a_time_and_none_twice() -> None:
    sweep = Sweep(cliff)
    finder = Finder(curves(), RULE)
    sweep.run(finder, most=3, workers=9)
    assert len(sweep.order) == len(set(sweep.order))
    running = [tuple(run.split()[:3]) for run in sweep.order if run not in sweep.ended]
    assert len(running) == len(set(running)) == 7


@given(st.integers(0, 40), st.integers(0, 40))
def test_what_was_killed_goes_on_as_if_it_had_not_been(first: int, second: int) -> None:
    whole = Sweep(cliff)
    undisturbed = whole.run(Finder(curves(), RULE, 3))
    killed = Sweep(cliff)
    for most in (first, second, 1000):
        finder = killed.run(Finder(curves(), RULE, 3, ended=killed.ended), most)
    assert killed.order == whole.order
    assert finder.brackets == undisturbed.brackets


def test_a_swept_matrix_needs_nothing_more_and_a_curve_that_is_not_monotone_says_so() -> None:
    def rough(run: str) -> Score:
        return Score(0.4) if " 0.3 " in run else cliff(run)

    every = {run: rough(run) for curve in curves() for run in chain(curve.dense, *curve.runs)}
    finder = Finder(curves(), RULE, ended=every)
    assert finder.next() is None
    assert finder.brackets[0].text() == "passes 0.5, fails 0.6 (9 runs); not monotone: fails 0.3 below"


def test_a_failed_dense_run_leaves_its_curves_open_and_costs_nothing_more() -> None:
    sweep = Sweep(lambda run: None if run == "t0 none 0" else cliff(run))
    finder = sweep.run(Finder(curves(), RULE))
    assert not [run for run in sweep.order if run.startswith("t0") and "none" not in run]
    assert [finder.is_decided(number) for number in range(8)] == [False] * 4 + [True] * 4
    assert finder.brackets[0].text() == "nothing can be said: its dense run has no result"


def test_where_the_dense_run_is_at_chance_there_is_nothing_to_find_and_nothing_to_learn() -> None:
    def scores(run: str) -> Score:
        return replace(cliff(run), is_at_chance=run == "t0 none 0")

    sweep = Sweep(scores)
    finder = sweep.run(Finder(curves(), RULE))
    assert not [run for run in sweep.order if run.startswith("t0") and "none" not in run]
    assert all(map(finder.is_decided, range(8)))
    assert finder.brackets[0].text() == "nothing to find: its dense run is at chance"
    assert finder.brackets[0].as_json()["passes"] is None


def test_a_run_that_may_not_start_here_leaves_room_for_others() -> None:
    finder = Finder(curves(), RULE)
    assert finder.next(lambda run: run.startswith("t1")) == "t1 none 0"
    assert finder.next(lambda run: False) is None


def test_every_point_of_a_level_is_run_before_the_next_level() -> None:
    row = dict(zip(KEY, ("torch", "m", "t", "a", MODES[0], "one-shot", 0), strict=True))
    runs = {(level, rate): f"t a x {level:g} {rate}" for level in NINE for rate in "xy"}
    runs |= {(0.0, rate): f"t none {rate}" for rate in "xy"}
    cells = [row | {"sparsity": at, "run_id": run, "axes": {"rate": rate}} for (at, rate), run in runs.items()]
    sweep = Sweep(lambda run: replace(cliff(run), eval_loss=1.0))
    sweep.run(Finder(curves_of(cells), RULE))
    assert [" ".join(run.split()[-2:]) for run in sweep.order] == [
        *("none x", "none y"),
        *(f"{level} {rate}" for level in (0.5, 0.7, 0.6) for rate in "xy"),
    ]


def test_a_level_with_several_points_is_run_at_all_seeds_over_which_one_is_chosen() -> None:
    row = dict(zip(KEY, ("torch", "m", "t", "a", MODES[0], "one-shot", 0), strict=True))
    cells = [
        row | {"sparsity": at, "seed": seed, "run_id": f"t a x {at:g} {rate}{seed}", "axes": {"rate": rate}}
        for at, rate, seed in product((0.0, *NINE), "xy", (0, 1))
    ]
    sweep = Sweep(lambda run: replace(cliff(run), eval_loss=1.0))
    finder = sweep.run(Finder(curves_of(cells), RULE))
    assert [run.split()[3:] for run in sweep.order[4:8]] == [["0.5", point] for point in ("x0", "x1", "y0", "y1")]
    assert [bracket.text() for bracket in finder.brackets] == ["passes 0.5, fails 0.6 (3 runs)"] * 2
    assert len(sweep.order) == 4 * 4
    assert [finder.curve_of(f"t a x 0.5 x{seed}") for seed in (0, 1)] == [0, 1]


def test_runs_that_a_level_begins_from_come_first_and_their_failure_is_its_own() -> None:
    [first, *_] = curves(tasks=1)
    runs = [run for [run] in first.runs]
    before = dict(pairwise(reversed(runs)))
    sweep = Sweep(cliff)
    finder = sweep.run(Finder([first], RULE, before=before))
    assert sweep.order == ["t0 none 0", *runs[:6]]
    assert finder.brackets[0].text() == "passes 0.5, fails 0.6 (6 runs)"
    sweep = Sweep(lambda run: None if run == runs[2] else cliff(run))
    finder = sweep.run(Finder([first], RULE, before=before))
    assert sweep.order == ["t0 none 0", *runs[:3]]
    assert "cannot be decided at 0.3 and 0.4 and 0.5" in finder.brackets[0].text()


def test_a_choice_among_ten_thousand_cells_looks_at_one_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets are made when a run ends, for its own curve."""
    many = curves(tasks=252)
    assert sum(len(curve.levels) + 1 for curve in many) == 10_080
    finder, calls = Finder(many, RULE, ended={curve.dense[0]: Score(0.9) for curve in many}), Counter[str]()

    def count(name: str, function: Callable[..., object]) -> None:
        def counted(*args: object) -> object:
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(find, name, counted)

    count("next_level", next_level)
    count("bracket_of", bracket_of)
    run = finder.next()
    assert run
    finder.started(run)
    finder.ended(run, Score(0.9))
    assert calls == {"next_level": 2, "bracket_of": 1}
