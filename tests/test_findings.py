"""Findings: what is claimed is carried by a test, and every number leads to its runs."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sound import make_cells, make_outcomes, sound_ledger, sound_run, write_sound

from analysis.read.chosen import ONE_RATE
from analysis.read.imported import Imported
from analysis.read.load import cells_table
from analysis.read.results import read_results
from analysis.report.report import write_report
from analysis.report.tables import grouped_summary
from analysis.stats.claims import QUESTIONS, Claim, as_markdown, headlines, number
from analysis.stats.comparisons import ALL_BASES, Points, compare_values, swap_sides
from analysis.stats.findings import _best_words, describe_seeds, make_claims
from analysis.stats.scopes import Scope
from analysis.stats.statistics import wilson
from tune_sparse.config import Cell
from tune_sparse.ledger.ledger import Ledger

TASKS = ("boolq", "hellaswag")


def written(
    folder: Path,
    accuracy: dict[str, float],
    drop: float = 0.3,
    seeds: Iterable[int] = (0, 1, 2),
    sparsities: Iterable[float] = (0.0, 0.3, 0.5, 0.6, 0.9),
) -> Ledger:
    """Two bases, two methods, two modes: the accuracy of a mode less `drop` times the sparsity."""
    cells = [
        cell
        for model in ("tiny", "other")
        for seed in seeds
        for cell in make_cells(sparsities=sparsities, model=model, seed=seed)
    ]
    return sound_ledger(
        folder, cells, accuracy=lambda cell: accuracy[cell.mode] - drop * cell.sparsity if cell.sparsity else None
    )


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Sparse-to-sparse is better by a fifth."""
    return written(tmp_path_factory.mktemp("apart"), {"sparse-to-dense": 0.75, "sparse-to-sparse": 0.95})


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return written(tmp_path_factory.mktemp("alike"), {"sparse-to-dense": 0.85, "sparse-to-sparse": 0.85})


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Sparse-to-sparse is better by a fifth, in the only training of each cell."""
    accuracy = {"sparse-to-dense": 0.75, "sparse-to-sparse": 0.95}
    return written(tmp_path_factory.mktemp("one"), accuracy, seeds=(0,), sparsities=(0.0, 0.5, 0.9))


@cache
def load_points(ledger: Ledger) -> Points:
    results = read_results([ledger.folder])
    predictions = {run: e.predictions for run, e in results.by_run.items() if e.predictions}
    return Points(cells_table([ledger.folder]), predictions)


@cache
def find_claims(ledger: Ledger, *imported: Imported) -> list[Claim]:
    return make_claims(load_points(ledger), imported)[0]


def texts(claims: list[Claim], question: str, about: str = "") -> str:
    return "\n".join(c.text for c in claims if c.question == question and about in c.about)


@pytest.mark.parametrize("name", ["apart", "alike", "one_seed"])
def test_every_number_of_a_claim_is_one_of_its_numbers_and_has_runs(name: str, request: pytest.FixtureRequest) -> None:
    ledger: Ledger = request.getfixturevalue(name)
    runs = {path.name for path in (ledger.folder / "runs").iterdir()}
    claims = find_claims(ledger)
    assert {claim.question for claim in claims} == set(QUESTIONS) - {"RQ4", "RQ5"}, "one backend, one schedule"
    for claim in claims:
        fields = {field for _, field, _, _ in string.Formatter().parse(claim.template) if field}
        assert fields <= set(claim.numbers)
        words = "".join(literal for literal, *_ in string.Formatter().parse(claim.template))
        written_out = re.sub(r"within (an imported dense baseline|\d+%)|\d+% up to|of 2%|CS-3", "", words)
        assert not re.search(r"\d", written_out), claim.template
        for shown in claim.numbers.values():
            assert shown.run_ids
            assert set(shown.run_ids) <= runs
        assert set(claim.run_ids) <= runs


def test_a_mean_is_that_of_the_runs_behind_it(apart: Ledger) -> None:
    cells = cells_table([apart.folder]).set_index("run_id")
    [claim] = [c for c in find_claims(apart) if c.question == "RQ2" and c.about == ALL_BASES and "mean0" in c.numbers]
    mean = claim.numbers["mean0"]
    assert mean.value == pytest.approx(cells.loc[list(mean.run_ids), "accuracy"].mean())
    assert len(mean.run_ids) == 48


def test_a_difference_that_is_there_is_claimed_in_its_direction(apart: Ledger) -> None:
    claims = find_claims(apart)
    for about in ("torch, tiny, boolq", "torch, other, boolq"):
        assert f"Sparse-to-sparse is better than sparse-to-dense {ONE_RATE} by +0." in texts(claims, "RQ3", about)
    shown = texts(claims, "RQ3", ALL_BASES)
    assert "and 0 of sparse-to-dense" in shown
    assert re.search(
        r"2 of 2 agree in sign\), for these models and tasks: other, tiny on boolq; 3 seeds, 48 pairs", shown
    )


def test_no_difference_is_claimed_where_there_is_none(alike: Ledger) -> None:
    claims = find_claims(alike)
    for about in ("torch, tiny, boolq", "torch, other, boolq"):
        assert "No difference can be shown between sparse-to-sparse and sparse-to-dense" in texts(claims, "RQ3", about)
        assert "no difference can be shown between" in texts(claims, "RQ2", about)
        assert "is better than" not in texts(claims, "RQ2", about)


def test_a_report_of_one_seed_says_why_it_has_no_headline(one_seed: Ledger) -> None:
    lines = write_report([one_seed.folder]).lines
    assert describe_seeds(cells_table([one_seed.folder])) in lines
    assert not [line for line in lines if line.startswith("RQ")]


def test_one_seed_is_described_without_a_verdict(one_seed: Ledger) -> None:
    """Once a sweep of one seed was headlined "is better, p = 0.024"."""
    claims = find_claims(one_seed)
    assert {claim.scope for claim in claims} <= {None, Scope.TRAININGS}
    shown = "\n".join(claim.text for claim in claims)
    assert not re.search("better|worse|p [=<]|no difference can be shown between", shown)
    assert headlines(claims) == []
    overall = [c.text for c in claims if c.about == ALL_BASES and c.question != "RQ1" and "pairs" in c.numbers]
    assert len(overall) == 2
    for line in overall:
        assert re.search(rf"In these trainings, {ONE_RATE}, .* over 8 pairs; one seed shows nothing of other", line)


def test_three_seeds_give_verdicts_for_what_is_listed(apart: Ledger) -> None:
    for line in headlines(find_claims(apart)):
        assert "for these models and tasks: other, tiny on boolq; 3 seeds" in line
    tests = make_claims(load_points(apart))[1]
    assert set(tests["scope"]) == {"these trainings", "these models and tasks"}, "pairs, and means"


def test_two_seeds_are_too_few(apart: Ledger) -> None:
    cells = cells_table([apart.folder]).query("seed < 2")
    claims, _ = make_claims(Points(cells, load_points(apart).predictions))
    assert headlines(claims) == []
    assert "two seeds show too little of other trainings" in texts(claims, "RQ3", ALL_BASES)


def test_a_comparison_of_modes_or_methods_says_that_the_rate_was_shared(apart: Ledger, one_seed: Ledger) -> None:
    compared = [
        claim
        for claim in [*find_claims(apart), *find_claims(one_seed)]
        if {"difference0", "won", "eta_squared_method"} & set(claim.numbers)
        or (claim.question == "RQ3" and "difference" in claim.numbers)
    ]
    assert len(compared) == 18
    assert all(ONE_RATE in claim.text.lower() for claim in compared)


def test_of_fewer_than_five_pairs_each_is_spoken_of_and_none_is_a_headline(one_seed: Ledger) -> None:
    """Once one pair of runs was headlined "sparse-to-sparse is better"."""
    cells = cells_table([one_seed.folder]).query("method == 'random' and model == 'tiny' and sparsity == 0.5")
    claims, _ = make_claims(Points(cells, load_points(one_seed).predictions))
    assert headlines(claims) == []
    shown = texts(claims, "RQ3", ALL_BASES)
    assert re.search(rf"{ONE_RATE}: these two models differ, sparse-to-sparse minus sparse-to-dense \+0\.\d+ \(", shown)
    assert not re.search("better|worse", shown)


def test_all_seeds_count_in_what_is_said_of_a_base(apart: Ledger) -> None:
    """Once the first seed stood for all: dense .80 and seeds of .79, .55, .55 were "within 2%"."""
    points = load_points(apart)
    cells = cells_table([apart.folder]).query("model == 'tiny' and method == 'random' and mode == 'sparse-to-sparse'")
    half, dense = cells[cells["sparsity"] == 0.5], cells[cells["sparsity"] == 0]
    predictions = dict(points.predictions)
    rng = np.random.default_rng(0)
    for (_, row), accuracy in zip(half.iterrows(), (0.95, 0.55, 0.55), strict=True):
        scores = (rng.random(400) < accuracy).astype(float)
        predictions[row["run_id"]] = replace(predictions[row["run_id"]], scores=scores)
        cells.loc[cells["run_id"] == row["run_id"], "accuracy"] = scores.mean()
    claims, _ = make_claims(Points(cells[cells["sparsity"].isin([0.0, 0.5])], predictions))
    [reach] = [c for c in claims if "reach2" in c.numbers]
    assert reach.numbers["reach10"].value == 0
    assert len(reach.run_ids) == len(dense) + len(half) == 6
    assert [c.text for c in claims if "Half" in c.text] == [
        "Half of the weights gone: 0 of 1 settings are within 10% of dense, 0 within 5%."
    ]


def test_cells_of_different_protocols_are_not_compared(apart: Ledger) -> None:
    cells = cells_table([apart.folder])
    assert cells["protocol_id"].nunique() == 1
    cells.loc[cells["mode"] == "sparse-to-sparse", "protocol_id"] = "another"
    points = Points(cells, load_points(apart).predictions)
    assert points.pairs("mode", "sparse-to-dense", "sparse-to-sparse").empty
    assert set(points.to_dense(0.5)["mode"]) == {"sparse-to-dense"}


def test_one_backend_one_method_and_one_mode_are_not_spoken_of(apart: Ledger) -> None:
    cells = cells_table([apart.folder])
    only = cells[(cells["method"] == "random") & (cells["mode"] == "sparse-to-dense")]
    claims, _ = make_claims(Points(only, load_points(apart).predictions))
    assert {claim.question for claim in claims} == {"RQ1"}
    page = as_markdown(claims, "seeds", "audit")
    assert "RQ1" in page
    assert "RQ2" not in page


def test_two_backends_are_compared_cell_by_cell(alike: Ledger) -> None:
    points = load_points(alike)
    other = points.pruned.assign(backend="cerebras", run_id=points.pruned["run_id"] + "+")
    predictions = {**points.predictions, **{f"{run}+": points.predictions[run] for run in points.pruned["run_id"]}}
    both = Points(pd.concat([points.pruned, other]), predictions)
    shown = texts(make_claims(both)[0], "RQ4")
    assert "Of 96 cells that ran on two backends, the two models are shown to differ in accuracy in 0." in shown
    assert "cerebras 128, torch 128" in shown


def test_curves_are_followed_against_dense_on_the_same_examples(apart: Ledger) -> None:
    shown = texts(find_claims(apart), "RQ1", "torch, tiny, boolq")
    assert re.search(r"random, sparse-to-sparse: within 2% up to \S+ \(shown up to \S+\), 5% up to", shown)
    assert re.search(r"Half of the weights gone: \d of 4 settings are within 10% of dense, \d within 5%\.", shown)
    assert re.search(r"Nine tenths gone: \d of 4 settings are above chance and the largest class \(0\.\d+\)", shown)
    assert "No earlier dense result was imported" in shown


def test_nothing_is_shown_beyond_what_the_accuracies_reach(apart: Ledger) -> None:
    reaches = [c.numbers for c in find_claims(apart) if "reach2" in c.numbers]
    assert len(reaches) == 8
    for numbers in reaches:
        assert numbers["reach2"].value <= numbers["reach5"].value <= numbers["reach10"].value
        for mark in ("2", "5", "10"):
            assert numbers[f"shown{mark}"].value <= numbers[f"reach{mark}"].value


def test_a_break_is_where_a_fall_is_shown(tmp_path: Path) -> None:
    cells = make_cells(methods=("random",), sparsities=(0.0, 0.3, 0.6))
    ledger = Ledger(tmp_path)
    ledger = sound_ledger(tmp_path, [cell for cell in cells if cell.sparsity < 0.6])
    for mode in ("sparse-to-dense", "sparse-to-sparse"):
        write_sound(ledger, sound_run(Cell("tiny", "boolq", "random", 0.6, mode, 0, "torch")), accuracy=0.6)
    sweep = ledger.sweeps()[0]
    runs = [sound_run(cell.trained).run_id for cell in cells]
    rows = [
        {**sweep.cells[0], **vars(c), "cell_id": f"c{i}", "run_id": r}
        for i, (c, r) in enumerate(zip(cells, runs, strict=True))
    ]
    ledger.write_sweep(replace(sweep, cells=tuple(rows)))
    shown = texts(find_claims(ledger), "RQ1")
    assert shown.count("breaks between 0.3 and 0.6, the largest fall that is shown") == 2
    assert "breaks between 0 and 0.3" not in shown


def test_an_imported_baseline_is_measured_against(alike: Ledger) -> None:
    dense = cells_table([alike.folder]).query("sparsity == 0 and model == 'tiny'")["accuracy"].mean()
    near = Imported("tiny", "boolq", round(dense, 3), "lab {A}", 400)
    far = Imported("tiny", "boolq", dense - 0.2, "lab B")
    shown = texts(find_claims(alike, near, far), "RQ1", "torch, tiny, boolq")
    assert "passes the mark of 2% within the imported baseline" in shown
    assert "(lab {A}) and cannot be told from it" in shown
    assert "(lab B) and differs from it: +0.200" in shown
    assert "No earlier dense result" not in shown
    assert "No earlier dense result" in texts(find_claims(alike, near, far), "RQ1", "torch, other, boolq")


def test_shared_dense_runs_are_in_no_pair(apart: Ledger) -> None:
    points = load_points(apart)
    assert len(points.dense) == 6
    assert set(points.dense["run_id"]).isdisjoint(points.pruned["run_id"])
    pairs = points.pairs("mode", "sparse-to-dense", "sparse-to-sparse")
    assert len(pairs) == 48
    assert (pairs["sparsity"] > 0).all()


def test_runs_that_answered_other_questions_are_not_compared(apart: Ledger) -> None:
    points = load_points(apart)
    odd = points.pruned["run_id"].iloc[0]
    before = points.predictions[odd]
    predictions = {**points.predictions, odd: replace(before, ids=np.array([f"x{i}" for i in before.ids], object))}
    fewer = Points(cells_table([apart.folder]), predictions)
    assert len(fewer.pruned) == len(points.pruned) - 1
    assert odd not in set(fewer.pruned["run_id"])


def test_turning_a_test_turns_its_numbers(apart: Ledger) -> None:
    test = compare_values(load_points(apart), "mode")[0]
    back = swap_sides(test, test.left)
    assert (back.left, back.right) == (test.right, test.left)
    assert (back.estimate.value, back.estimate.low) == (-test.estimate.value, -test.estimate.high)
    assert swap_sides(test, test.right) is test


def test_a_method_with_a_colon_in_its_name_can_be_spoken_of(apart: Ledger) -> None:
    cells = cells_table([apart.folder]).query("model == 'tiny'").replace({"method": {"random": "wanda-2:4"}})
    claims, _ = make_claims(Points(cells, load_points(apart).predictions))
    assert "wanda-2:4" in texts(claims, "RQ2")


def test_texts_are_compared_by_their_likelihoods_and_not_averaged_with_accuracies(apart: Ledger) -> None:
    cells, predictions = cells_table([apart.folder]), dict(load_points(apart).predictions)
    of_text = cells["model"] == "other"
    cells.loc[of_text, "accuracy"] = None
    for run in set(cells.loc[of_text, "run_id"]):
        predictions[run] = replace(predictions[run], scores=predictions[run].scores - 2.5)
    claims, _ = make_claims(Points(cells, predictions))
    assert re.search(r"by \+0\.\d+ log-likelihood a token", texts(claims, "RQ3", "torch, other, boolq"))
    assert re.search(r"by \+0\.\d+ accuracy", texts(claims, "RQ3", "torch, tiny, boolq"))
    assert "for these models and tasks: tiny on boolq; 3 seeds" in texts(claims, "RQ3", ALL_BASES)
    assert texts(claims, "RQ1", "torch, other, boolq") == ""


def test_nothing_finished_says_nothing(apart: Ledger) -> None:
    cells = cells_table([apart.folder]).assign(status="missing")
    claims, tests = make_claims(Points(cells, {}))
    assert tests.empty
    assert all(not claim.numbers for claim in claims)


def test_what_was_not_measured_is_unknown(apart: Ledger) -> None:
    cells = cells_table([apart.folder]).query("model == 'tiny'").assign(train_examples_per_second=float("nan"))
    claims, _ = make_claims(Points(cells, load_points(apart).predictions))
    [cost] = [claim for claim in claims if claim.about == "cost on torch"]
    assert cost.numbers["rate0"].value is None
    assert "sparse-to-dense unknown examples a second" in cost.text
    json.dumps([claim.as_json() for claim in claims], allow_nan=False)


def test_the_report_writes_what_it_claims(apart: Ledger) -> None:
    report = write_report([apart.folder])
    folder = apart.folder / "analysis"
    assert report.errors == 0
    assert [line.split(":")[0] for line in report.lines if line.startswith("RQ")] == ["RQ1", "RQ2", "RQ3"]
    page, data = (folder / "findings.md").read_text(), json.loads((folder / "findings.json").read_text())
    assert all(claim["text"] in page for claim in data)
    assert describe_seeds(cells_table([apart.folder])) in page
    assert "Accuracy is by the primary metric of its task: acc of boolq." in page
    tests = pd.read_csv(folder / "tests.csv")
    assert {"RQ2", "RQ3"} == set(tests["question"])
    assert (tests["p_corrected"] >= tests["p"] - 1e-12)[tests["p"].notna()].all()
    assert {claim["scope"] for claim in data} == {None, "these trainings", "these models and tasks"}
    summary = pd.read_csv(folder / "summary.csv")
    row = summary[summary["sparsity"] == 0.3].iloc[0]
    low, high = wilson(row["accuracy"] * 400, 400)
    assert (row["accuracy_low"], row["accuracy_high"]) == (pytest.approx(low), pytest.approx(high))
    grouped = pd.read_csv(folder / "grouped_summary.csv")
    assert len(grouped) == 8
    assert (grouped["cells"] == 12).all()
    assert (grouped["seeds"] == 3).all()
    assert (grouped["sd"] > 0).all()
    assert grouped[["low", "high"]].isna().all(axis=None)
    rules = {finding["rule"] for finding in json.loads((folder / "audit.json").read_text())}
    assert rules == set(" ".join(summary["warnings"].dropna()).split()) == {"at-chance"}


def test_headlines_are_the_first_headline_of_each_question() -> None:
    claims = [
        Claim("RQ2", "x", "a {n}", {"n": number(1, ["r"], ".0f")}, is_headline=True),
        Claim("RQ2", "x", "b", is_headline=True),
        Claim("RQ3", "x", "d"),
        Claim("RQ1", "x", "c", scope=Scope.LISTED, test="t", is_headline=True),
    ]
    assert headlines(claims) == ["RQ1: c", "RQ2: a 1"]
    page = as_markdown(claims, "seeds", "audit")
    assert "- a 1\n- b" in page
    assert "- c *(these models and tasks; t)*" in page
    assert claims[-1].as_json()["scope"] == "these models and tasks"


def test_outcomes_of_the_fixture_repeat() -> None:
    run = sound_run(Cell("tiny", "boolq", "random", 0.3, "sparse-to-dense", 0, "torch"))
    assert make_outcomes(run, 0.5) == make_outcomes(run, 0.5)


def test_a_fall_that_is_shown_is_told_where_a_larger_one_is_not(apart: Ledger) -> None:
    """Once "no single step shows a fall" was said where the largest alone was too uncertain."""
    points = load_points(apart)
    cells = cells_table([apart.folder]).query("model == 'tiny' and method == 'random' and mode == 'sparse-to-sparse'")
    predictions, known = dict(points.predictions), np.random.default_rng(0).permutation(400) / 400
    right = {0.0: (1.0, 1.0, 1.0), 0.3: (0.8, 0.8, 0.8), 0.5: (0.9, 0.5, 0.1)}
    for _, row in cells[cells["sparsity"] < 0.6].iterrows():
        share = right[row["sparsity"]][row["seed"]]
        scores = (known < share).astype(float)
        predictions[row["run_id"]] = replace(predictions[row["run_id"]], scores=scores)
        cells.loc[cells["run_id"] == row["run_id"], "accuracy"] = scores.mean()
    claims, _ = make_claims(Points(cells[cells["sparsity"] < 0.6], predictions))
    [broken] = [c.text for c in claims if "breaks between" in c.text or "no single step" in c.text]
    assert "breaks between 0 and 0.3, the largest fall that is shown, from 1.000 to 0.8" in broken


def test_settings_count_that_share_their_seeds(apart: Ledger) -> None:
    """A seed that only begins takes no other setting away, and every seed averages the same settings."""
    points = load_points(apart)
    pairs = points.pairs("mode", "sparse-to-dense", "sparse-to-sparse").query("model == 'tiny'")
    first = (pairs["method"] == "random") & (pairs["sparsity"] == 0.3)
    begun = pd.concat([pairs, pairs[first & (pairs["seed"] == 0)].assign(seed=3)])
    [found] = points.differences(begun)
    assert (found.seeds, found.pairs) == ((0, 1, 2), len(pairs))
    [found] = points.differences(begun[~(first.reindex(begun.index) & (begun["seed"] == 1))])
    assert (found.seeds, found.pairs) == ((0, 1, 2), len(pairs) - 3), "not the first's 0, 2 and 3 beside them"
    [found] = points.differences(pairs[first | (pairs["seed"] == 0)])
    assert (found.seeds, found.pairs) == ((0, 1, 2), 3), "enough for a verdict before more pairs"


def test_the_best_mean_may_be_shown_worse_where_each_model_and_task_counts_alike(apart: Ledger) -> None:
    """Once such a difference was listed under "no difference can be shown"."""
    test = next(t for t in compare_values(load_points(apart), "mode") if t.about == ALL_BASES)
    words, _ = _best_words(test.left, [test], ONE_RATE)
    assert f"{test.left} is worse than {test.right}: " in words
    assert "no difference" not in words


def test_a_number_that_is_not_finite_is_unknown() -> None:
    """As the ends of an interval of a text of one window, which JSON cannot hold."""
    assert [number(value, ["r"]).value for value in (float("inf"), -float("inf"), float("nan"))] == [None] * 3


def test_a_grouped_summary_of_one_seed_has_the_interval_over_examples(one_seed: Ledger) -> None:
    points = load_points(one_seed)
    summary = grouped_summary(points)
    assert summary["sd"].isna().all()
    for row in summary.to_dict("records"):
        same = (points.pruned[["model", "method", "mode"]] == [row["model"], row["method"], row["mode"]]).all(axis=1)
        scores = np.mean([points.predictions[run].scores for run in points.pruned.loc[same, "run_id"]], axis=0)
        assert row["mean_score"] == pytest.approx(scores.mean())
        interval = stats.t.interval(0.95, len(scores) - 1, scores.mean(), stats.sem(scores))
        assert (row["low"], row["high"]) == pytest.approx(interval)
