"""The setting that is chosen for each cell: by selection examples alone, over seeds, at reading time."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from factories import done_record, failed_record, make_cell, make_run, write_run
from hypothesis import given
from hypothesis import strategies as st

from analysis.audit.audit import audit_folders
from analysis.read.chosen import ONE_RATE, UNDECIDED, compared_cells, rates_words
from analysis.read.load import cells_table
from analysis.read.seeds import over_seeds, repeated_settings
from analysis.report.choices import choice_lines, choices_table
from tune_sparse.config import Cell, Protocol
from tune_sparse.ledger.choice import choices, chosen_runs, requested_cells
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import SweepRecord
from tune_sparse.ledger.run import Run, readable_id

RATES = (1e-4, 3e-4, 1e-3)
CELLS = tuple(make_cell(sparsity=s, mode=m, seed=n) for s, m, n in product((0.0, 0.5), ("sparse-to-dense",), (0, 1)))


def run_at(cell: Cell, rate: float) -> Run:
    return make_run(cell, protocol=Protocol(learning_rate=rate))


def axis_sweep(cells: Iterable[Cell] = CELLS, rates: Sequence[float] = RATES, started: float = 1.0) -> SweepRecord:
    """A sweep with the axis learning_rate, or without one where there is one rate."""
    has_axis, rows = len(rates) > 1, []
    for cell, rate in product(cells, rates):
        run = run_at(cell.trained, rate)
        ids = {"cell_id": readable_id(cell, run_at(cell, rate).identity), "run_id": run.run_id, "pruning_id": None}
        point = {"axes": {"learning_rate": rate} if has_axis else {}}
        rows.append(ids | point | {"shared_with": None, **asdict(cell), "chance": 0.5})
    axes = {"axes": {"learning_rate": list(rates)}} if has_axis else {}
    return SweepRecord(f"sweep{started:g}", started, axes, tuple(rows))


def write_losses(ledger: Ledger, cells: Iterable[Cell], losses: Mapping[float, float], accuracy: float = 0.7) -> None:
    for cell, (rate, loss) in product(cells, losses.items()):
        run = run_at(cell.trained, rate)
        write_run(ledger, run, done_record(run, accuracy, eval_loss=loss))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def chosen_rates(cells: pd.DataFrame) -> list[float]:
    return [float(rate) for rate in cells.loc[cells["chosen"], "axis/learning_rate"]]


def test_the_lowest_mean_loss_over_seeds_is_chosen_and_siblings_stay(ledger: Ledger) -> None:
    ledger.write_sweep(axis_sweep())
    outlier = run_at(CELLS[-1], 1e-3)
    write_run(ledger, outlier, done_record(outlier, eval_loss=0.1))
    write_losses(ledger, CELLS, {1e-4: 0.6, 3e-4: 0.5, 1e-3: 0.7})
    cells = cells_table([ledger.folder])
    assert len(cells) == len(CELLS) * len(RATES)
    assert chosen_rates(cells) == [3e-4, 3e-4, 1e-3, 1e-3]
    assert set(cells["candidates"]) == {"0.0001, 0.0003, 0.001"}
    compared = compared_cells(cells)
    assert len(compared) == len(CELLS)
    assert over_seeds(compared)["axis/learning_rate"].tolist() == [3e-4, 1e-3]
    assert rates_words(compared) == (
        "with the learning rate chosen for each cell on selection examples (of 3: 0.0001, 0.0003, 0.001)"
    )
    assert chosen_runs(ledger)[outlier.run_id]
    assert sum(chosen_runs(ledger).values()) == len(CELLS)


def test_of_equal_losses_the_earlier_setting_is_chosen(ledger: Ledger) -> None:
    ledger.write_sweep(axis_sweep())
    write_losses(ledger, CELLS, dict.fromkeys(RATES, 0.5))
    assert set(chosen_rates(cells_table([ledger.folder]))) == {1e-4}


def test_nothing_is_chosen_while_a_setting_has_not_ended_and_a_failed_one_is_out(ledger: Ledger) -> None:
    ledger.write_sweep(axis_sweep())
    write_losses(ledger, CELLS, {1e-4: 0.6, 3e-4: 0.5})
    cells = cells_table([ledger.folder])
    assert not cells["chosen"].any()
    assert set(cells["choice"]) == {"not chosen: 2 of 3 settings done"}
    compared = compared_cells(cells)
    assert list(compared["status"]) == [UNDECIDED] * len(CELLS)
    assert list(compared["error"]) == ["not chosen: 2 of 3 settings done"] * len(CELLS)
    assert compared[["accuracy", "eval_loss", "axis/learning_rate"]].isna().all(axis=None)
    for cell in CELLS:
        run = run_at(cell.trained, 1e-3)
        write_run(ledger, run, failed_record(run))
    assert set(chosen_rates(cells_table([ledger.folder]))) == {3e-4}


def test_nothing_is_chosen_where_every_setting_has_a_run_that_failed(ledger: Ledger) -> None:
    ledger.write_sweep(axis_sweep(CELLS[2:]))
    write_losses(ledger, CELLS[2:3], dict.fromkeys(RATES, 0.5))
    for rate in RATES:
        run = run_at(CELLS[3], rate)
        write_run(ledger, run, failed_record(run))
    why = "not chosen: each of 3 settings has a run that failed or was stopped"
    assert set(cells_table([ledger.folder])["choice"]) == {why}


@given(st.randoms(use_true_random=False))
def test_choices_do_not_change_when_everything_of_test_examples_does(numbers: random.Random) -> None:
    cells = requested_cells([axis_sweep()])
    runs = [run_at(cell.trained, rate) for cell, rate in product(CELLS, RATES)]
    records = {run.run_id: done_record(run, numbers.random(), eval_loss=numbers.random()) for run in runs}
    of_test = [{k: v for k, v in record.metrics.items() if k != "eval_loss"} for record in records.values()]
    numbers.shuffle(of_test)
    permuted = {
        run_id: replace(record, metrics=record.metrics | other)
        for (run_id, record), other in zip(records.items(), of_test, strict=True)
    }
    assert choices(cells, permuted.get) == choices(cells, records.get)


def test_a_later_sweep_with_more_values_supersedes_the_choice(ledger: Ledger) -> None:
    ledger.write_sweep(axis_sweep(rates=RATES[:2]))
    ledger.write_sweep(axis_sweep(CELLS[2:], started=2.0))
    write_losses(ledger, CELLS, {1e-4: 0.6, 3e-4: 0.5, 1e-3: 0.4})
    cells = cells_table([ledger.folder])
    assert chosen_rates(cells) == [3e-4, 3e-4, 1e-3, 1e-3], "cells of the earlier sweep alone keep its choice"
    assert len(requested_cells(ledger.sweeps())) == 2 * 2 + 2 * 3
    assert chosen_rates(cells_table([ledger.folder], ["sweep1"])) == [3e-4] * 4


def test_tuned_cells_join_with_tuned_ones_and_never_with_those_of_one_rate(ledger: Ledger) -> None:
    ledger.write_sweep(axis_sweep())
    ledger.write_sweep(axis_sweep(CELLS[2:], rates=(3e-4,), started=2.0))
    write_losses(ledger, CELLS, {1e-4: 0.6, 3e-4: 0.5, 1e-3: 0.7})
    compared = compared_cells(cells_table([ledger.folder]))
    tuned = compared[compared["candidates"].str.contains(",")]
    alone = compared[~compared["candidates"].str.contains(",")]
    assert (len(tuned), len(alone)) == (4, 2)
    assert tuned["protocol_id"].nunique() == 1
    assert set(tuned["protocol_id"]).isdisjoint(alone["protocol_id"])
    assert set(alone["run_id"]) < set(tuned["run_id"]), "the same runs, in two studies"
    assert len(repeated_settings(compared)) == 4
    assert not audit_folders([ledger.folder], ["sweep1"]).rules_about(alone["run_id"].iloc[0]).count("PROTOCOL")


def test_choices_say_how_flat_they_were_and_what_they_cost(ledger: Ledger) -> None:
    ledger.write_sweep(axis_sweep())
    for rate, loss, accuracy in zip(RATES, (0.6, 0.5, 0.7), (0.9, 0.7, 0.6), strict=True):
        write_losses(ledger, CELLS, {rate: loss}, accuracy)
    requested = cells_table([ledger.folder])
    table = choices_table(requested)
    assert len(table) == 2
    first = table.iloc[0]
    assert (first["axes"], first["chosen"], first["runs"]) == ("learning_rate", "0.0003", 6)
    assert first["selection_loss"] == pytest.approx(0.5)
    assert first["second_is_higher_by"] == pytest.approx(0.1)
    assert first["spread_of_primary"] == pytest.approx(0.3)
    assert (first["hours"], first["siblings_hours"]) == pytest.approx((6 * 3 / 3600, 4 * 3 / 3600))
    chosen, flat, price = choice_lines(requested)
    assert chosen == (
        "Chosen for each of 2 cells by the loss on selection examples, learning rate: 0.0001 in 0, 0.0003 in 2, "
        "0.001 in 0."
    )
    assert flat.endswith("loss higher by 0.1, and over the settings the primary metric spreads by 0.3.")
    assert price.startswith("  Choosing took 8 runs, 0.00667 hours")


def test_without_axes_every_row_counts(ledger: Ledger) -> None:
    ledger.write_sweep(axis_sweep(rates=(3e-4,)))
    failed = run_at(CELLS[-1], 3e-4)
    write_run(ledger, failed, failed_record(failed))
    cells = cells_table([ledger.folder])
    assert cells["chosen"].all()
    pd.testing.assert_frame_equal(compared_cells(cells), cells)
    assert rates_words(cells) == ONE_RATE
    assert choice_lines(cells) == []
    assert not [name for name in cells if str(name).startswith("axis/")]
