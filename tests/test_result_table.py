"""The result at the end of a sweep, and as a command: every accuracy, its spread and doubts, and what failed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from factories import done_record, failed_record, make_cell, make_run, make_sweep, write_run
from sound import PROTOCOL, edit, make_cells, sound_ledger

from analysis.audit.audit import Audit, AuditFinding
from analysis.read.load import cells_table
from analysis.report.result_table import finished_cells, result_lines
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, FAULT, OK
from tune_sparse.config import Cell
from tune_sparse.ledger.ledger import Ledger

NOTHING_FOUND = Audit((), 0)
MODES = ("sparse-to-dense", "sparse-to-sparse")


def cells_of(folder: Path, accuracies: dict[Cell, float], **metrics: Any) -> pd.DataFrame:
    """A sweep that requested these cells; each run has its accuracy."""
    ledger = Ledger(folder)
    ledger.write_sweep(make_sweep(accuracies))
    for cell, accuracy in accuracies.items():
        run = make_run(cell.trained)
        write_run(ledger, run, done_record(run, accuracy, **metrics))
    return cells_table([folder]).assign(primary_metric="acc")


def found_of(rule: str, severity: Any, *run_ids: str) -> AuditFinding:
    return AuditFinding(rule, severity, "planted", run_ids)


def test_a_line_has_accuracy_before_and_after_its_spread_and_its_difference_to_dense(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, {make_cell(sparsity=0.0): 0.9, make_cell(): 0.75})
    assert result_lines(cells, NOTHING_FOUND) == [
        "Results: after tuning, with the standard error over examples (one seed):",
        "model task  method       sparsity mode             seeds metric before after    +- - dense",
        "tiny  boolq none         0        dense                1 acc     0.500 0.900 0.030  +0.000",
        "tiny  boolq unstructured 0.5      sparse-to-dense      1 acc     0.500 0.750 0.030  -0.150",
        "- dense: minus the dense baseline; the findings of the report say what a test shows.",
    ]


def test_the_dense_baseline_that_cells_share_has_one_line(tmp_path: Path) -> None:
    table = finished_cells(cells_of(tmp_path, dict.fromkeys(map_matrix((0.0, 0.5)), 0.8)), NOTHING_FOUND)
    assert table["mode"].tolist() == ["dense", *MODES]
    assert table["difference"].tolist() == [0.0, 0.0, 0.0]


def map_matrix(sparsities: tuple[float, ...]) -> list[Cell]:
    return [make_cell(sparsity=sparsity, mode=mode) for sparsity in sparsities for mode in MODES]


def test_seeds_are_averaged_and_their_deviation_is_told(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, {make_cell(seed=seed): value for seed, value in enumerate((0.79, 0.55, 0.55))})
    heading, _, line, *_ = result_lines(cells, NOTHING_FOUND)
    assert heading == "Results: after tuning, with the standard deviation between 3 seeds:"
    assert line.split()[4:] == ["sparse-to-dense", "3", "acc", "0.500", "0.630", "0.139", "–"]


def test_the_other_metric_stands_beside_the_primary_one(tmp_path: Path) -> None:
    both = {"primary_metric": "acc", "acc": 0.75, "acc_stderr": 0.03, "acc_norm": 0.8, "acc_norm_stderr": 0.02}
    cells = cells_of(tmp_path, {make_cell(): 0.75}).assign(**both)
    _, header, line, *_ = result_lines(cells, NOTHING_FOUND)
    assert header.split()[-1] == "acc_norm"
    assert line.split()[6] == "acc"
    assert line.endswith("0.800 (0.020)")


def test_warnings_are_letters_with_a_legend_and_what_holds_everywhere_is_said_once(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, {make_cell(sparsity=0.0): 0.9, make_cell(): 0.4})
    dense, pruned = cells["run_id"]
    found = [
        found_of("few-examples", "warning", dense, pruned),
        found_of("at-chance", "warning", pruned),
        found_of("overlap", "error", pruned),
    ]
    lines = result_lines(cells, Audit(tuple(found), 2))
    assert [line.split()[-1] for line in lines[1:4]] == ["warnings", "+0.000", "ab"]
    assert lines[-3:] == [
        "a: OVERLAP, scored questions were trained on",
        "b: at-chance, no better than guessing",
        "every cell: few-examples (`tune-sparse audit` explains)",
    ]


def test_what_did_not_finish_is_counted_with_its_reason(tmp_path: Path) -> None:
    cells = [make_cell(sparsity=sparsity) for sparsity in (0.3, 0.5, 0.7, 0.9)]
    ledger = Ledger(tmp_path)
    ledger.write_sweep(make_sweep(cells))
    for cell in cells[:2]:
        write_run(ledger, make_run(cell), failed_record(make_run(cell)))
    write_run(ledger, make_run(cells[2]), done_record(make_run(cells[2])))
    lines = result_lines(cells_table([tmp_path]), NOTHING_FOUND)
    assert lines[-2:] == ["2 failed: RunError: the loss is nan at step 7", "1 missing: not run yet"]
    assert len(lines) == 6


def test_a_sweep_without_a_finished_cell_says_so(tmp_path: Path) -> None:
    Ledger(tmp_path).write_sweep(make_sweep([make_cell()]))
    assert result_lines(cells_table([tmp_path]), NOTHING_FOUND) == [
        "Results: no cell is finished.",
        "1 missing: not run yet",
    ]
    assert main(["results", "--results-dir", str(tmp_path)]) == FAULT


def test_a_long_table_has_a_line_a_curve_and_points_to_the_command(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, dict.fromkeys(map_matrix((0.0, 0.3, 0.5)), 0.8))
    lines = result_lines(cells, NOTHING_FOUND, most=3)
    assert lines == [
        "Results: after tuning:",
        "model task  method       mode             metric     0   0.3   0.5",
        "tiny  boolq none         dense            acc    0.800     –     –",
        "tiny  boolq unstructured sparse-to-dense  acc        – 0.800 0.800",
        "tiny  boolq unstructured sparse-to-sparse acc        – 0.800 0.800",
        "`tune-sparse results` has every cell with its spread, before tuning, and against dense.",
    ]
    assert "and 1 more" in result_lines(cells, NOTHING_FOUND, most=2)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return sound_ledger(tmp_path_factory.mktemp("results"))


def printed(ledger: Ledger, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["results", "--results-dir", str(ledger.folder), *arguments]) == OK
    return capsys.readouterr().out


def test_the_command_prints_every_cell_or_those_of_some_methods(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(ledger, capsys).count("sparse-to-") == 8
    some = printed(ledger, capsys, "--method", "random", "--mode", "sparse-to-sparse")
    assert some.count("sparse-to-sparse") == 2
    assert "unstructured" not in some
    assert main(["results", "--results-dir", str(ledger.folder), "--method", "randon"]) == BAD_INPUT
    assert "unknown method 'randon'. Did you mean 'random'?" in capsys.readouterr().err


def test_json_has_the_numbers_of_the_table(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(printed(ledger, capsys, "--json"))
    assert len(rows) == 9
    [dense] = [row for row in rows if row["mode"] == "dense"]
    for row in rows:
        assert row["difference"] == pytest.approx(row["value"] - dense["value"])
        assert (row["sweep"], row["accuracy_sd"], row["seeds"]) == (None, None, 1)


def test_sweeps_of_the_same_cells_have_a_table_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = make_cells(methods=("random",), sparsities=(0.0, 0.3))
    sound_ledger(tmp_path, cells)
    sound_ledger(tmp_path, cells, replace(PROTOCOL, learning_rate=0.001), started=2000.0)
    assert main(["results", "--results-dir", str(tmp_path)]) == OK
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Sweep")] == [
        "Sweep sweep1000",
        "Sweep sweep2000",
    ]


def test_an_error_of_the_audit_is_a_letter_and_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = sound_ledger(tmp_path, make_cells(methods=("random",), sparsities=(0.0, 0.3)))
    run_id = ledger.sweeps()[0].cells[-1]["run_id"]
    edit(ledger.run_folder(run_id) / "result.json", metrics={"accuracy": 0.99})
    assert main(["results", "--results-dir", str(tmp_path)]) == FAULT
    assert "a: UNPROVEN-NUMBER, a number that no run stands behind" in capsys.readouterr().out
