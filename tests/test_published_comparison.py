"""A comparison is made only where model, task, metric and few-shot setting agree; otherwise the reason is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from factories import done_record, make_cell, make_run, make_sweep, write_run
from test_published import published

from analysis.baselines.comparison import compare_with_published, protocols, summary_sentence
from analysis.read.load import cells_table
from analysis.report.phoenix import phoenix_table
from tune_sparse.config import Protocol
from tune_sparse.ledger.ledger import Ledger

FEW = Protocol(num_fewshot=5)
SAME: dict[str, Any] = {"model": "Tiny", "task": "boolq", "method": "random", "mode": "sparse-to-dense", "value": 0.6}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Five-shot runs at sparsity 0.5 of two methods and two seeds, and at 0; accuracies 0.7 to 0.9."""
    ledger = Ledger(tmp_path_factory.mktemp("results"))
    accuracies = {("random", 0): 0.70, ("random", 1): 0.72, ("wanda", 0): 0.80, ("wanda", 1): 0.84}
    cells = [make_cell(method=method, seed=seed) for method, seed in accuracies]
    cells += [make_cell(sparsity=0.0, method=method) for method in ("random", "wanda")]
    sweep = make_sweep(cells, protocol=FEW)
    sweep.config["protocol"] = {"num_fewshot": 5, "max_tokens": 2048}
    ledger.write_sweep(sweep)
    for cell in {cell.trained for cell in cells}:
        run = make_run(cell, protocol=FEW)
        write_run(ledger, run, done_record(run, accuracies.get((cell.method, cell.seed), 0.9), perplexity=7.0))
    return cells_table([ledger.folder]), protocols(ledger)


def test_the_setting_with_their_method_stands_beside(cells: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    [found] = compare_with_published([published(**SAME)], *cells)
    assert found.reason is None
    assert found.value == pytest.approx(0.71)
    assert found.difference == pytest.approx(0.11)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.11 < found.high
    assert (found.our_setting, len(found.run_ids)) == ("random, sparse-to-dense", 2)


def test_without_their_method_the_best_of_ours_stands_beside_and_says_so(
    cells: tuple[pd.DataFrame, dict[str, Any]],
) -> None:
    [found] = compare_with_published([published(**SAME | {"method": "lonas"})], *cells)
    assert found.value == pytest.approx(0.82)
    assert found.our_setting == "wanda, sparse-to-dense, the best of 2"


def test_at_sparsity_0_the_one_dense_run_stands_beside(cells: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    [found] = compare_with_published([published(**SAME | {"sparsity": 0.0, "method": "none"})], *cells)
    assert (found.value, found.our_setting, len(found.run_ids)) == (0.9, "dense", 1)


def test_a_perplexity_needs_the_same_windows_and_has_no_interval(cells: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    rows = [published(**SAME | {"metric": "perplexity", "value": 8.0, "context_tokens": t}) for t in (2048, 4096, None)]
    same, other, unstated = compare_with_published(rows, *cells)
    assert (same.reason, same.value, same.difference, same.low) == (None, 7.0, -1.0, None)
    assert other.reason == "theirs on windows of 4096 tokens, ours of 2048"
    assert unstated.reason == "the source does not state the tokens of its windows"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": None}, "not available: nobody has entered the number yet"),
        ({"metric": "accuracy_generated"}, "scored by generated choices, ours by their likelihoods"),
        ({"model": "llama-7b"}, "no finished run of llama-7b"),
        ({"task": "gsm8k"}, "no finished run of this model on gsm8k"),
        ({"num_fewshot": 0}, "theirs is 0-shot, ours 5-shot"),
        ({"num_fewshot": None}, "the source does not state its few-shot setting"),
        ({"sparsity": None}, "the source does not state a sparsity"),
        ({"sparsity": 0.7}, "no finished run of ours at sparsity 0.7"),
    ],
)
def test_what_does_not_agree_is_not_compared(
    change: dict[str, Any], reason: str, cells: tuple[pd.DataFrame, dict[str, Any]]
) -> None:
    [found] = compare_with_published([published(**SAME | change)], *cells)
    assert found.reason == reason
    assert (found.value, found.difference, found.run_ids) == (None, None, ())


def test_what_is_not_done_is_not_compared(cells: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    table, job_protocol = cells
    [found] = compare_with_published([published(**SAME)], table.assign(status="failed"), job_protocol)
    assert found.reason == "no finished run of Tiny"


def test_the_table_of_phoenix_says_what_is_missing(cells: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    rows = [published(**SAME | {"source": "Phoenix", **change}) for change in ({}, {"value": None}, {"num_fewshot": 0})]
    comparisons = compare_with_published([*rows, published(**SAME)], *cells)
    lines = phoenix_table(comparisons).splitlines()[5:-2]
    assert len(lines) == 3
    assert lines[0].startswith("Tiny & boolq & 0.5 & 0.6 & 0.710 & +0.1")
    assert lines[1].endswith(r"not available & -- & not available \\")
    assert lines[2].endswith(r"-- & not comparable: theirs is 0-shot, ours 5-shot \\")
    summary = summary_sentence(comparisons)
    assert summary.startswith("2 of 4 published numbers have a comparable run of ours; 1 are not avail")


def test_protocols_are_those_of_the_sweeps(tmp_path: Path) -> None:
    Ledger(tmp_path).write_sweep(make_sweep([make_cell()]))
    assert protocols(Ledger(tmp_path)) == {make_run().run_id: {"steps": 200}}
