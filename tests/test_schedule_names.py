"""Two settings of one schedule: other curves in every table, and each compared with one-shot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from factories import make_sweep
from sound import PROTOCOL, sound_run, write_sound

from analysis.read.load import cells_table
from analysis.read.results import read_results
from analysis.read.seeds import over_seeds
from analysis.report.result_table import _chosen
from analysis.stats.comparisons import Points
from analysis.stats.schedule_claims import compare_schedules
from tune_sparse.config import Cell, ScheduleSettings
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import readable_id

SEEDS = (0, 1, 2)


def add_sweep(
    ledger: Ledger, schedule: str, sparsities: Mapping[float, float], started: float, axes: Any = None, **settings: Any
) -> None:
    """sparsities: {sparsity: accuracy}"""
    asked = ScheduleSettings(**settings)
    cells = [
        Cell("tiny", "boolq", "unstructured", sparsity, "masked-finetuning", seed, "torch", schedule)
        for sparsity in sparsities
        for seed in SEEDS
    ]
    sweep, rows = make_sweep(cells, started), []
    for cell, row in zip(cells, sweep.cells, strict=True):
        run = sound_run(cell, PROTOCOL, schedule_settings=asked)
        write_sound(ledger, run, sparsities[cell.sparsity])
        rows.append(row | {"cell_id": readable_id(cell, run.identity), "run_id": run.run_id, "shared_with": None})
    config = sweep.config | {"schedule_settings": settings, "axes": axes or {}}
    ledger.write_sweep(replace(sweep, config=config, cells=tuple(rows)))


def cells_of(folder: Path) -> tuple[pd.DataFrame, Points]:
    results, table = read_results([folder]), cells_table([folder])
    return table, Points(table, {run: e.predictions for run, e in results.by_run.items() if e.predictions})


def test_two_settings_of_a_schedule_are_two_curves_each_against_one_shot(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    add_sweep(ledger, "one-shot", {0.5: 0.0}, 1.0)
    add_sweep(ledger, "rigl", {0.5: 1.0}, 2.0, update_every=2)
    add_sweep(ledger, "rigl", {0.5: 0.0}, 3.0, update_every=3)
    table, points = cells_of(tmp_path)
    twice, thrice = "rigl update_every=2", "rigl update_every=3"
    means = over_seeds(table).set_index("schedule")
    assert means["accuracy"].to_dict() == {"one-shot": 0.0, twice: 1.0, thrice: 0.0}
    assert means["seeds"].tolist() == [3, 3, 3]
    tests = {(test.left, test.right): test for test in compare_schedules(points)}
    assert tests["one-shot", twice].cells == tests["one-shot", thrice].cells == 3
    assert tests["one-shot", twice].estimate.value == 1.0
    assert tests["one-shot", thrice].estimate.value == 0.0
    assert _chosen(table, {"schedule": ["rigl"]})["schedule"].unique().tolist() == [twice, thrice]


def test_settings_at_different_sparsities_are_no_one_curve(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    add_sweep(ledger, "set", {0.5: 1.0}, 1.0, update_every=2, drop_curve="constant")
    add_sweep(ledger, "set", {0.9: 0.0}, 2.0, update_every=2, drop_curve="cosine")
    table, _ = cells_of(tmp_path)
    assert table.groupby("schedule")["sparsity"].unique().map(list).to_dict() == {
        "set drop_curve=constant": [0.5],
        "set drop_curve=cosine": [0.9],
    }


def test_a_default_that_is_written_out_and_a_setting_that_is_not_read_are_no_other_schedule(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    add_sweep(ledger, "set", {0.5: 1.0}, 1.0, update_every=2)
    add_sweep(ledger, "set", {0.9: 0.0}, 2.0, update_every=2, update_to=0.75, gradual_updates=4)
    table, _ = cells_of(tmp_path)
    assert table["schedule"].unique().tolist() == ["set"]


def test_levels_are_those_that_a_sweep_asked_for_not_those_up_to_a_cell(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    add_sweep(ledger, "iterative", {0.5: 1.0, 0.9: 1.0}, 1.0, levels=(0.1, 0.3))
    assert cells_of(tmp_path)[0]["schedule"].unique().tolist() == ["iterative"]
    add_sweep(ledger, "iterative", {0.5: 0.0}, 2.0, levels=(0.1, 0.3, 0.4))
    assert cells_of(tmp_path)[0]["schedule"].unique().tolist() == [
        "iterative levels=0.1 0.3",
        "iterative levels=0.1 0.3 0.4",
    ]


def test_values_of_an_axis_are_no_other_schedule(tmp_path: Path) -> None:
    ledger, axes = Ledger(tmp_path), {"update_every": [2, 3]}
    add_sweep(ledger, "rigl", {0.5: 1.0}, 1.0, axes, update_every=2)
    add_sweep(ledger, "rigl", {0.9: 1.0}, 2.0, axes, update_every=3)
    assert cells_of(tmp_path)[0]["schedule"].unique().tolist() == ["rigl"]
