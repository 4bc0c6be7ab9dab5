"""torch beside cerebras: only the same cells, on the same examples, with compile time apart from the rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from sound import edit, make_cells, sound_ledger

from analysis.baselines.published import load_published
from analysis.read.load import cells_table
from analysis.read.results import read_results
from analysis.report.hardware import hardware_pairs, hardware_rows, published_rates
from analysis.report.runs import Runs, find_runs
from tune_sparse.ledger.ledger import Ledger


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Runs]:
    """Five runs of torch, three of which cerebras has too."""
    torch_cells = make_cells(methods=("random",))
    cells = [*torch_cells, *(replace(cell, backend="cerebras") for cell in torch_cells if cell.sparsity < 0.6)]
    ledger = sound_ledger(tmp_path_factory.mktemp("results"), cells)
    for folder in (ledger.folder / "runs").glob("cerebras*"):
        edit(folder / "result.json", measured={"compile_seconds": 120.0, "train_tokens_per_second": 8192.0})
    found = read_results([ledger.folder]).by_run
    predictions = {run_id: e.predictions for run_id, e in found.items() if e.predictions}
    return cells_table([ledger.folder]), find_runs([ledger.folder], predictions)


def test_pairs_are_cells_that_both_finished(both: tuple[pd.DataFrame, Runs]) -> None:
    pairs = hardware_pairs(*both)
    assert sorted(zip(pairs["sparsity"], pairs["mode"], strict=True)) == [
        (0.0, "sparse-to-dense"),
        (0.3, "sparse-to-dense"),
        (0.3, "sparse-to-sparse"),
    ]
    assert (pairs["run_id_torch"] != pairs["run_id_cerebras"]).all()


def test_the_difference_is_of_the_same_examples_with_its_interval(both: tuple[pd.DataFrame, Runs]) -> None:
    pairs = hardware_pairs(*both)
    for pair in pairs.itertuples():
        assert pair.difference == pytest.approx(pair.accuracy_cerebras - pair.accuracy_torch)
        assert pair.low < pair.difference < pair.high


def test_where_the_examples_differ_nothing_is_compared(both: tuple[pd.DataFrame, Runs], tmp_path: Path) -> None:
    cells, runs = both
    pairs = hardware_pairs(cells, Runs(runs.ledger))
    assert pairs["difference"].isna().all()
    assert hardware_rows(pairs)[0]["difference"] == "–"
    assert hardware_pairs(cells_table([tmp_path]), find_runs([tmp_path])).empty


def test_a_row_shows_compile_time_apart_from_rates(both: tuple[pd.DataFrame, Runs]) -> None:
    row = hardware_rows(hardware_pairs(*both))[0]
    assert (row["tokens"], row["examples"]) == ("4,096 / 8,192", "128 / 128")
    assert row["compile"] == "– / 120"
    assert row["torch_run"].startswith("torch_")
    assert row["cerebras_run"].startswith("cerebras_")


def test_published_rates_of_a_cs3_say_how_much_they_weigh() -> None:
    rates = published_rates(load_published())
    weights = [rate["weight"] for rate in rates]
    assert {weight: weights.count(weight) for weight in weights} == {"official": 2, "a run's log": 3, "unofficial": 31}
    assert weights == sorted(weights, key=["official", "a run's log", "unofficial"].index)
    dense = next(rate for rate in rates if "batch 1024" in rate["where"])
    assert (dense["model"], dense["rate"], dense["sparsity"]) == ("Llama-2-7b-hf", "31.98", "0")
    runs_twice = [rate for rate in rates if "the other version of this table" in rate["notes"]]
    assert len(runs_twice) == 24


def test_one_backend_has_no_pairs(tmp_path: Path) -> None:
    ledger: Ledger = sound_ledger(tmp_path, make_cells(methods=("random",), sparsities=(0.3,)))
    assert hardware_pairs(cells_table([ledger.folder]), find_runs([ledger.folder])).empty
