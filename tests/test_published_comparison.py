"""A published number stands beside ours only where both were measured alike, and nobody wins by being one of many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from factories import done_record, make_cell, make_run, make_sweep, write_run
from test_published import published

from analysis.baselines.comparison import (
    compare_with_published,
    protocols,
    summary_sentence,
)
from analysis.baselines.published import load_published
from analysis.read.chosen import ONE_RATE
from analysis.read.load import cells_table
from analysis.report.phoenix import phoenix_table
from analysis.stats.many_settings import Spread, interval_among, pooled_spread
from tune_sparse.config import Protocol
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.ledger.ledger import Ledger

FEW = Protocol(num_fewshot=5)
ALL = 3270
"""The test examples of boolq."""
SAME: dict[str, Any] = {"model": "Tiny", "task": "boolq", "method": "random", "mode": "sparse-to-dense"}
SAME |= {"metric": "acc", "value": 0.6}
Cells = tuple[pd.DataFrame, dict[str, Any]]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """Five-shot runs at sparsity 0.5 of two methods and three seeds, and at 0; accuracies 0.69 to 0.9."""
    ledger = Ledger(tmp_path_factory.mktemp("results"))
    accuracies = {("random", 0): 0.70, ("random", 1): 0.72, ("random", 2): 0.71, ("wanda", 0): 0.80, ("wanda", 1): 0.84}
    cells = [make_cell(method=method, seed=seed) for method, seed in accuracies]
    cells += [make_cell(sparsity=0.0, method=method) for method in ("random", "wanda")]
    sweep = make_sweep(cells, protocol=FEW)
    sweep.config["protocol"] = {"num_fewshot": 5, "max_tokens": 2048, "n_test": None}
    ledger.write_sweep(sweep)
    for cell in {cell.trained for cell in cells}:
        run = make_run(cell, protocol=FEW)
        accuracy = accuracies.get((cell.method, cell.seed), 0.9)
        write_run(ledger, run, done_record(run, accuracy, perplexity=7.0, n_examples=ALL))
    table = cells_table([ledger.folder])
    named = {"acc": table["accuracy"], "acc_before_tuning": table["accuracy_before_tuning"]}
    return table.assign(**named), protocols(ledger)


def test_the_setting_with_their_method_and_mode_stands_alone_beside(cells: Cells) -> None:
    [found] = compare_with_published([published(**SAME)], *cells)
    assert found.reason is None
    assert found.value == pytest.approx(0.71)
    assert found.difference == pytest.approx(0.11)
    assert (found.low, found.high) == pytest.approx(interval_among(0.71, 0.6, ALL, 3, Spread(0.0001, 2), 1))
    assert (found.our_setting, len(found.run_ids)) == ("random, sparse-to-dense", 3)
    assert (found.described, found.verdict) == ("random, sparse-to-dense, mean of 3 seeds", "higher")


def test_what_was_run_because_of_other_results_stands_beside_no_number(cells: Cells) -> None:
    table, known = cells
    [found] = compare_with_published([published(**SAME)], table.assign(comparable=table["sparsity"] == 0), known)
    assert found.reason == "ours was run because of other results (`--find`, `--budget`)"


def test_without_their_method_every_setting_stands_beside_and_none_is_chosen(cells: Cells) -> None:
    found = compare_with_published([published(**SAME | {"method": "lonas"})], *cells)
    assert [c.our_setting for c in found] == ["random, sparse-to-dense", "wanda, sparse-to-dense"]
    assert [c.settings for c in found] == [2, 2]
    assert found[1].described == (
        "wanda, sparse-to-dense, mean of 2 seeds, one of 2 settings, interval corrected for all"
    )
    assert (found[1].low, found[1].high) == pytest.approx(
        interval_among(0.82, 0.6, ALL, 2, Spread((2 * 0.0001 + 0.0008) / 3, 3), 2)
    )
    assert found[1].verdict == "", "two seeds do not tell how far trainings spread"


def test_one_seed_is_described_without_a_verdict(cells: Cells) -> None:
    table, protocol = cells
    [found] = compare_with_published([published(**SAME)], table[table["seed"] == 0], protocol)
    assert found.low is not None
    assert found.low > 0
    assert (found.verdict, found.described) == ("", "random, sparse-to-dense, one seed: these trainings")


def test_what_was_pruned_and_not_trained_stands_beside_ours_before_tuning(cells: Cells) -> None:
    [found] = compare_with_published([published(**SAME | {"training": "none", "mode": ""})], *cells)
    assert (found.value, found.our_setting) == (0.5, "random, before tuning")


def test_at_sparsity_0_the_one_dense_run_stands_beside(cells: Cells) -> None:
    [found] = compare_with_published([published(**SAME | {"sparsity": 0.0, "method": "none"})], *cells)
    assert (found.value, found.our_setting, len(found.run_ids), found.settings) == (0.9, "dense", 1, 1)


def test_a_perplexity_needs_the_same_windows_and_has_no_interval(cells: Cells) -> None:
    rows = [published(**SAME | {"metric": "perplexity", "value": 8.0, "context_tokens": t}) for t in (2048, 4096, None)]
    same, other, unstated = compare_with_published(rows, *cells)
    assert (same.reason, same.value, same.difference, same.low, same.verdict) == (None, 7.0, -1.0, None, "")
    assert other.reason == "theirs on windows of 4096 tokens, ours of 2048"
    assert unstated.reason == "the source does not state the tokens of its windows"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": None}, "not available: nobody has entered the number yet"),
        ({"metric": "acc_generated"}, "scored by generated choices, ours by their likelihoods"),
        ({"metric": "acc_norm"}, "our runs have no acc_norm"),
        ({"model": "llama-7b"}, "no finished run of llama-7b"),
        ({"task": "gsm8k"}, "no finished run of this model on gsm8k"),
        ({"num_fewshot": 0}, "theirs is 0-shot, ours 5-shot"),
        ({"num_fewshot": None}, "the source does not state its few-shot setting"),
        ({"training": ""}, "the source does not state what was trained on"),
        (
            {"training": "other"},
            "theirs was trained on something else, such as instructions or plain text; ours on the task alone",
        ),
        ({"sparsity": None}, "the source does not state a sparsity"),
        ({"sparsity": 0.7}, "no finished run at 0.7"),
    ],
)
def test_what_does_not_agree_is_not_compared(change: dict[str, Any], reason: str, cells: Cells) -> None:
    [found] = compare_with_published([published(**SAME | change)], *cells)
    assert found.reason == reason
    assert (found.value, found.difference, found.run_ids) == (None, None, ())


def test_a_sample_of_the_test_examples_is_not_compared(cells: Cells) -> None:
    table, protocol = cells
    [found] = compare_with_published([published(**SAME)], table.assign(n_examples=200.0), protocol)
    assert found.reason == "theirs on all 3270 test examples, ours on 200"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data_dir": "/data"}, None),
        ({"data_dir": "/data", "n_test": 100}, "ours not on all test examples"),
        ({"data_dir": "synthetic"}, "ours not on all test examples"),
    ],
)
def test_where_no_number_of_test_examples_is_known_the_settings_tell(
    change: dict[str, Any], reason: str | None, cells: Cells
) -> None:
    table, protocol = cells
    protocol = {run_id: settings | change for run_id, settings in protocol.items()}
    [found] = compare_with_published([published(**SAME | {"task": "mawps"})], table.assign(task="mawps"), protocol)
    assert found.reason == reason


def test_the_numbers_of_test_examples_are_those_of_real_splits() -> None:
    from tune_sparse.data.synthetic import SYNTHETIC_TASKS, synthetic_examples
    from tune_sparse.evaluation.published import TASKS as FORECAST

    known = {name: task.test_examples for name, task in TASKS.items() if isinstance(task, PromptTask)}
    assert {name for name, count in known.items() if count is None} == {"mawps"}
    assert all(known[name] == sizes.test_examples for name, sizes in FORECAST.items())
    for name in SYNTHETIC_TASKS:
        assert len(synthetic_examples(name, TASKS[name].test_split)) != known[name]


def test_a_source_that_contradicts_itself_is_not_compared(cells: Cells) -> None:
    one, other = published(**SAME), published(**SAME | {"table": "Table 1, corrected", "value": 0.7})
    found = compare_with_published([one, other], *cells)
    assert [c.reason for c in found] == [
        "its source contradicts itself: 0.6 (Table 1), but 0.7 (Table 1, corrected)",
        "its source contradicts itself: 0.7 (Table 1, corrected), but 0.6 (Table 1)",
    ]
    rates = compare_with_published(load_published(), *cells)
    assert sum("contradicts itself" in (c.reason or "") and "commit" in (c.reason or "") for c in rates) == 24


def test_an_interval_is_never_empty_and_grows_with_the_spread_between_seeds() -> None:
    low, high = interval_among(1.0, 1.0, 100, 1, Spread(0.0, 0), 1)
    assert low < 0 < high
    spreads = [pooled_spread([[0.7 - s, 0.7, 0.7 + s]]) for s in (0.0, 0.01, 0.05)]
    widths = [np.diff(interval_among(0.7, 0.6, 1000, 3, spread, 1))[0] for spread in spreads]
    assert sorted(widths) == widths
    assert widths[2] > 2 * widths[0]


def test_the_spread_is_pooled_over_settings_with_several_seeds() -> None:
    assert pooled_spread([[0.5], [0.7]]) == Spread(0.0, 0)
    assert pooled_spread([[0.5], [0.6, 0.8], [0.1, 0.2, 0.3]]).df == 3


def shown_better(settings: int, seeds: int, luck: float, sweeps: int, among: int | None = None) -> float:
    """How often a setting of `settings` is shown better than a published number, though all are truly equal.

    among: for how many settings the intervals are to hold, all of them if None
    """
    rng, count, found = np.random.default_rng(settings), 1000, 0
    for _ in range(sweeps):
        logits = np.log(0.7 / 0.3) + luck * rng.standard_normal(settings * seeds + 1)
        scored = rng.binomial(count, 1 / (1 + np.exp(-logits))) / count
        ours, theirs = scored[1:].reshape(settings, seeds), float(scored[0])
        spread, best = pooled_spread(ours.tolist()), float(ours.mean(axis=1).max())
        found += interval_among(best, theirs, count, seeds, spread, among or settings)[0] > 0
    return found / sweeps


@pytest.mark.parametrize("settings", [1, 6, 24, 60])
@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.0), (3, 0.0), (3, 0.15)])
def test_none_of_many_equal_settings_is_shown_better_than_a_published_number(
    settings: int, seeds: int, luck: float
) -> None:
    assert shown_better(settings, seeds, luck, sweeps=400) <= 0.065


def test_the_best_of_many_with_the_interval_of_one_is_shown_better_far_too_often() -> None:
    assert shown_better(60, 1, 0.0, sweeps=400, among=1) > 0.2


def test_what_is_not_done_is_not_compared(cells: Cells) -> None:
    table, job_protocol = cells
    [found] = compare_with_published([published(**SAME)], table.assign(status="failed"), job_protocol)
    assert found.reason == "no finished run of Tiny"


def test_the_table_of_phoenix_says_what_is_missing(cells: Cells) -> None:
    rows = [published(**SAME | {"source": "Phoenix", **change}) for change in ({}, {"value": None}, {"num_fewshot": 0})]
    comparisons = compare_with_published([*rows, published(**SAME)], *cells)
    lines = phoenix_table(comparisons).splitlines()[5:-2]
    assert len(lines) == 3
    assert lines[0].startswith("Tiny & boolq & 0.5 & 0.6 & random, sparse-to-dense, mean of 3 seeds & 0.710 & +0.1")
    assert lines[1].endswith(r"not available & -- & -- & not available \\")
    assert lines[2].endswith(r"-- & -- & not comparable: theirs is 0-shot, ours 5-shot \\")
    summary = summary_sentence(comparisons, ONE_RATE)
    assert summary.startswith("2 of 4 published numbers have a comparable run of ours; 1 are not avail")


def test_protocols_are_those_of_the_sweeps(tmp_path: Path) -> None:
    Ledger(tmp_path).write_sweep(make_sweep([make_cell()]))
    assert protocols(Ledger(tmp_path)) == {make_run().run_id: {"steps": 200, "data_dir": None}}
