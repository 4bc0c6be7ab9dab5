"""What a report may compare in a sweep that chose its runs because of results."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from sound import make_cells, sound_ledger

from analysis.read.load import cells_table, chosen_cells, found_curves
from analysis.read.results import read_results
from analysis.report.report import write_report
from analysis.stats.comparisons import Points
from analysis.stats.findings import make_claims
from tune_sparse.ledger.ledger import Ledger

LEVELS = (0.0, 0.3, 0.5, 0.9)


@pytest.fixture
def found(tmp_path: Path) -> Ledger:
    """A sweep that was to find, and compares at 0.5; one of its runs at 0.3 was not needed."""
    ledger = sound_ledger(tmp_path, make_cells(sparsities=LEVELS), accuracy=lambda cell: 0.9 - cell.sparsity / 2)
    [sweep] = ledger.sweeps()
    asked = {"find": ["within=0.2"], "find_levels": 1, "budget": None, "compare_at": [0.5]}
    ledger.write_sweep(replace(sweep, chosen_by=asked))
    [needless, *_] = [cell["run_id"] for cell in sweep.cells if cell["sparsity"] == 0.3]
    shutil.move(ledger.run_folder(needless), tmp_path / "aside")
    return ledger


def make_whole(ledger: Ledger) -> None:
    run_id = next(cell["run_id"] for cell in ledger.sweeps()[0].cells if not ledger.is_done(cell["run_id"]))
    shutil.move(ledger.folder / "aside", ledger.run_folder(run_id))


def texts(ledger: Ledger, question: str) -> str:
    results = read_results([ledger.folder])
    predictions = {run: e.predictions for run, e in results.by_run.items() if e.predictions}
    claims, _ = make_claims(Points(cells_table([ledger.folder]), predictions))
    return "\n".join(claim.text for claim in claims if claim.question == question)


def test_methods_and_modes_are_compared_where_that_was_fixed_and_nowhere_else(found: Ledger) -> None:
    cells = cells_table([found.folder])
    assert set(cells.loc[cells["comparable"], "sparsity"]) == {0.0, 0.5}
    for question, sides in (("RQ2", "Methods"), ("RQ3", "Modes")):
        assert f"{sides} are compared at 0.5 alone, fixed before the first run" in texts(found, question)
    assert "The matrix is unfinished: 1 of its runs were not run" in texts(found, "RQ1")
    assert "only 0.5, 0.9 were run" in texts(found, "RQ1")


def test_backends_and_schedules_obey_what_methods_and_modes_do(found: Ledger) -> None:
    cells = cells_table([found.folder])
    backends = [cells, cells.assign(backend="cerebras", run_id="other " + cells["run_id"])]
    results = read_results([found.folder])
    known = {run: e.predictions for run, e in results.by_run.items() if e.predictions}
    points = Points(pd.concat(backends), known | {f"other {run}": scores for run, scores in known.items()})
    claims, tests = make_claims(points)
    of_backends = [claim.text for claim in claims if claim.question == "RQ4"]
    assert any("Backends are compared at 0.5 alone, fixed before" in text for text in of_backends)
    assert not any("Schedules" in claim.text for claim in claims)
    assert set(tests["question"]) >= {"RQ4"}


def test_without_levels_that_were_fixed_nothing_is_compared_and_the_report_says_why(found: Ledger) -> None:
    [sweep] = found.sweeps()
    found.write_sweep(replace(sweep, chosen_by={**(sweep.chosen_by or {}), "compare_at": []}))
    assert texts(found, "RQ2").count("\n") == 0
    assert "no sparsity was fixed before the first run (`--compare-at`)" in texts(found, "RQ2")


def test_a_matrix_that_is_whole_is_compared_whole(found: Ledger) -> None:
    before = chosen_cells(found)
    assert before
    make_whole(found)
    assert not chosen_cells(found)
    assert not found_curves(found)
    assert "fixed before" not in texts(found, "RQ2") + texts(found, "RQ3")


def test_another_sweep_makes_its_cells_comparable_once_it_is_whole(found: Ledger) -> None:
    [sweep] = found.sweeps()
    at = tuple(cell for cell in sweep.cells if cell["sparsity"] in (0.0, 0.9))
    found.write_sweep(replace(sweep, sweep_id="plain", cells=at, chosen_by=None))
    cells = cells_table([found.folder])
    assert set(cells.loc[cells["comparable"], "sparsity"]) == {0.0, 0.5, 0.9}


def test_a_report_gives_brackets_in_place_of_what_a_gap_would_end(found: Ledger) -> None:
    lines = write_report([found.folder]).lines
    place = list(lines).index("By --find, untested:")
    assert len(found_curves(found)) == len(make_cells(sparsities=(0.5,)))
    assert all(" passes " in line or " fails " in line for line in lines[place + 1 : place + 3])
    assert not any(line.startswith("Highest sparsity") for line in lines)
