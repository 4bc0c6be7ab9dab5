from __future__ import annotations

from dataclasses import replace
from itertools import chain, product

import pytest
from factories import done_record, make_cell, make_run, make_sweep

from tune_sparse.config.spending import FindRule
from tune_sparse.ledger.curves import Bracket, Score, bracket_of, curves_of, ended_runs, score_of

RULE = FindRule(0.10, 1.5)


def test_cells_that_differ_in_sparsity_are_a_curve_over_the_dense_run_that_serves_all() -> None:
    modes, levels = ("sparse-to-dense", "sparse-to-sparse"), (0.5, 0.0)
    cells = [make_cell(sparsity=level, mode=mode) for mode in modes for level in levels]
    first, second = curves_of(make_sweep(cells).cells)
    assert (first.levels, first.dense, first.name) == ((0.5,), second.dense, "tiny boolq unstructured sparse-to-dense")
    assert first.runs != second.runs
    [other] = curves_of(make_sweep([make_cell(seed=3, backend="cerebras")]).cells)
    assert other.name == "tiny boolq unstructured sparse-to-dense cerebras seed 3"
    assert curves_of(make_sweep([make_cell(sparsity=0.0)]).cells) == []


def test_a_level_passes_within_so_much_of_dense_whatever_is_right_on_paper() -> None:
    curve = curves_of(make_sweep([make_cell(sparsity=level) for level in (0.0, 0.1, 0.2, 0.3)]).cells)[0]
    values = dict(zip(chain(curve.dense, *curve.runs), (0.7, 0.63, 0.6299, 0.65), strict=True))
    found = bracket_of(curve, {run: Score(value) for run, value in values.items()}, RULE)
    assert found.passes == {0: True, 1: False, 2: True}
    assert found.text() == ("passes 0.3, the highest level: at least that (3 runs); not monotone: fails 0.2 below")
    texts = bracket_of(curve, {run: Score(10 / value, True) for run, value in values.items()}, FindRule(0.5, 1.08))
    assert texts.passes == {0: False, 1: False, 2: True}
    with pytest.raises(ValueError, match="no rule"):
        bracket_of(curve, {run: Score(value, True) for run, value in values.items()}, FindRule(0.1, None))


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ({}, "no level is measured yet"),
        ({0: False}, "fails 0.1, the lowest level: below that (1 run)"),
        ({0: True}, "passes 0.1 (1 run)"),
        ({0: True, 2: False}, "passes 0.1, fails 0.5 (2 runs)"),
    ],
)
def test_a_bracket_says_what_was_measured(passes: dict[int, bool], said: str) -> None:
    assert Bracket((0.1, 0.3, 0.5, 0.7), passes).text() == said


def test_what_is_decided() -> None:
    levels = (0.1, 0.3, 0.5, 0.7)
    assert Bracket(levels, {0: True, 1: False}).is_decided(1)
    assert not Bracket(levels, {0: True, 2: False}).is_decided(1)
    assert Bracket(levels, {0: True, 2: False}).is_decided(2)
    assert Bracket(levels, {3: True}).is_decided(1), "the highest passes"
    assert Bracket(levels, {0: False}).is_decided(1), "the lowest fails"
    assert not Bracket(levels, {2: True}).is_decided(3), "nothing fails yet"
    assert Bracket(levels, {0: True, 1: False}).as_json() == {
        "passes": 0.1,
        "fails": 0.3,
        "runs": 2,
        "is_monotone": True,
        "failed": [],
        "dense": "done",
    }


def test_a_score_is_the_primary_metric_and_its_value_before_the_last_mask() -> None:
    run = make_run()
    assert score_of(done_record(run, 0.8, accuracy_before_merge=0.85)) == Score(0.8, False, 0.85, 0.5)
    chance = {"chance_accuracy": 0.5, "majority_fraction": 0.6, "n_examples": 100}
    assert [score_of(done_record(run, value, **chance)).is_at_chance for value in (0.69, 0.70)] == [True, False]
    text = done_record(make_run(make_cell(task="wikitext2")), perplexity=12.0)
    del text.metrics["accuracy"]
    assert score_of(text).is_perplexity


def test_of_several_points_the_one_with_the_lowest_loss_on_selection_examples_speaks_for_a_level() -> None:
    """The better one on test examples has the higher loss."""
    row = make_sweep([make_cell()]).cells[0]
    cells = [
        row | {"sparsity": level, "axes": {"learning_rate": rate}, "run_id": f"{level} {rate}"}
        for level in (0.0, 0.5)
        for rate in (1, 2)
    ]
    [curve] = curves_of(cells)
    assert (curve.dense, curve.runs) == (("0.0 1", "0.0 2"), (("0.5 1", "0.5 2"),))
    known = {
        "0.0 1": Score(0.8, eval_loss=2.0),
        "0.0 2": Score(0.6, eval_loss=1.0),
        "0.5 1": Score(0.59, eval_loss=1.0),
    }
    assert bracket_of(curve, known, RULE).passes == {}, "a point is left"
    assert bracket_of(curve, known | {"0.5 2": Score(0.1, eval_loss=1.5)}, RULE).passes == {0: True}
    assert bracket_of(curve, known | {"0.5 2": None}, RULE).passes == {0: True}
    assert bracket_of(curve, known | {"0.5 1": None, "0.5 2": None}, RULE).failed == {0}


def test_a_curve_has_the_point_that_is_chosen_over_all_seeds_as_reports_have() -> None:
    row = make_sweep([make_cell()]).cells[0]
    cells = [
        row | {"sparsity": level, "seed": seed, "axes": {"rate": rate}, "run_id": f"{level} {rate} {seed}"}
        for level, seed, rate in product((0.0, 0.5), (0, 1), (1, 2))
    ]
    first, second = curves_of(cells)
    assert first.runs == (("0.5 1 0", "0.5 2 0"),)
    assert first.needed(first.runs[0]) == second.needed(second.runs[0]) == ("0.5 1 0", "0.5 1 1", "0.5 2 0", "0.5 2 1")
    known = {run: Score(0.8, eval_loss=1.0) for run in first.needed(first.dense)}
    known |= {"0.5 1 0": Score(0.8, eval_loss=1.0), "0.5 2 0": Score(0.2, eval_loss=1.1)}
    assert bracket_of(first, known, RULE).passes == {}, "the other seed is left"
    known |= {"0.5 1 1": Score(0.8, eval_loss=1.0), "0.5 2 1": Score(0.8, eval_loss=0.1)}
    assert [bracket_of(curve, known, RULE).passes for curve in (first, second)] == [{0: False}, {0: True}]
    assert bracket_of(first, known | {"0.5 2 1": None}, RULE).passes == {0: True}, "a setting without all seeds is out"


def test_a_stopped_run_has_ended_without_a_result() -> None:
    run = make_run()
    stopped, interrupted = (replace(done_record(run), status=status) for status in ("stopped", "interrupted"))
    assert ended_runs([stopped]) == {run.run_id: None}
    assert ended_runs([interrupted, None]) == {}
