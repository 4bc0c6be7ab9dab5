"""Cells of several schedules, read and compared: each schedule against the others, all else within one."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pandas as pd
import pytest
from sound import sound_ledger

from analysis.audit.audit import audit
from analysis.read.load import cells_table
from analysis.read.results import Results, read_results
from analysis.read.seeds import over_seeds
from analysis.report.latex import main_results
from analysis.report.report import highest_lines, write_report
from analysis.report.result_table import result_lines
from analysis.report.tables import grouped_summary, with_warnings
from analysis.stats.claims import Claim, headlines
from analysis.stats.comparisons import ALL_BASES, Points
from analysis.stats.findings import make_claims
from tune_sparse.config import Cell
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.tracking.entries import run_entry

GAIN = {"one-shot": 0.0, "set": 0.0, "rigl": 0.25}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """RigL is better by a quarter."""
    cells = [
        Cell("tiny", "boolq", "unstructured", sparsity, "masked-finetuning", seed, "torch", schedule)
        for schedule in GAIN
        for sparsity in (0.0, 0.5, 0.9)
        for seed in (0, 1, 2)
    ]
    return sound_ledger(tmp_path_factory.mktemp("schedules"), cells, accuracy=lambda cell: 0.6 + GAIN[cell.schedule])


@pytest.fixture(scope="module")
def results(ledger: Ledger) -> Results:
    return read_results([ledger.folder])


@pytest.fixture(scope="module")
def points(ledger: Ledger, results: Results) -> Points:
    predictions = {run: e.predictions for run, e in results.by_run.items() if e.predictions}
    return Points(cells_table([ledger.folder]), predictions)


@pytest.fixture(scope="module")
def claims(points: Points) -> list[Claim]:
    return [claim for claim in make_claims(points)[0] if claim.question == "RQ5"]


def test_every_schedule_is_compared_with_one_shot_and_the_others_with_each_other(claims: list[Claim]) -> None:
    assert [claim.about for claim in claims] == [
        name for name in (ALL_BASES, "sparsity 0.5", "sparsity 0.9") for _ in range(2)
    ]
    against, others = claims[0].text, claims[1].text
    number = r"[+-]\d\.\d{3} accuracy \([^)]+\)"
    assert re.match(
        rf"At one shared learning rate, against one-shot: set {number}, no difference can be shown; rigl {number}, "
        r"better; for these models and tasks: tiny on boolq; 3 seeds, 6 pairs\.$",
        against,
    )
    assert re.match(rf"At one shared learning rate, rigl minus set {number}, better; for these", others)
    assert headlines(claims) == [f"RQ5: {against}"]


def test_every_number_of_such_a_claim_is_one_of_its_numbers_and_has_runs(claims: list[Claim]) -> None:
    for claim in claims:
        parts = list(string.Formatter().parse(claim.template))
        assert {field for _, field, _, _ in parts if field} == claim.numbers.keys()
        assert not re.search(r"\d", "".join(literal for literal, *_ in parts))
        assert all(shown.run_ids for shown in claim.numbers.values())


def test_methods_and_modes_are_compared_within_one_schedule(points: Points) -> None:
    of = dict(list(points.pruned.groupby("schedule")))
    both = Points(pd.concat([of["one-shot"], of["rigl"].assign(method="random")]), points.predictions)
    assert both.pairs("method", "unstructured", "random").empty
    assert both.pairs("schedule", "one-shot", "rigl").empty


def test_the_audit_finds_no_error_in_what_schedules_share(results: Results) -> None:
    assert audit(results).errors == []


def test_tables_have_a_schedule_where_there_are_several(ledger: Ledger, points: Points, results: Results) -> None:
    cells, found = cells_table([ledger.folder]), audit(results)
    lines = result_lines(cells, found)
    assert lines[1].split()[:6] == ["model", "task", "method", "sparsity", "mode", "schedule"]
    assert sum(" rigl " in line for line in lines) == 2, "at sparsity 0 they share the runs of one-shot"
    summary = with_warnings(cells, found)
    assert r"task & metric & method & mode & schedule & 0 & 0.5 & 0.9 \\" in main_results(summary)
    reached = " ".join(highest_lines(over_seeds(cells)))
    assert re.search(r"masked-finetuning \S+, masked-finetuning rigl \S+, masked-finetuning set \S+$", reached)
    assert grouped_summary(points)["schedule"].tolist() == ["one-shot", "rigl", "set"]


def test_where_masks_are_made_once_no_table_speaks_of_schedules(ledger: Ledger, results: Results) -> None:
    cells, found = cells_table([ledger.folder]), audit(results)
    once = cells[cells["schedule"] == "one-shot"]
    shown = "\n".join([*result_lines(once, found), main_results(with_warnings(once, found))])
    assert "schedule" not in shown
    assert "one-shot" not in shown


def test_mlflow_has_the_settings_that_a_schedule_reads(ledger: Ledger) -> None:
    records = {record.run_id: record for record in map(ledger.record, ledger.run_ids()) if record}
    by_schedule = {entry.params["schedule"]: entry.params for entry in (run_entry(ledger, r) for r in records.values())}
    assert by_schedule["rigl"]["update_to"] == 0.75
    assert "update_to" not in by_schedule["one-shot"]


@pytest.mark.slow
def test_a_report_of_schedules_is_written_whole(ledger: Ledger) -> None:
    report = write_report([ledger.folder])
    assert report.errors == 0
    assert any(line.startswith("RQ5: At one shared learning rate, against one-shot: ") for line in report.lines)
    assert "unstructured, masked-finetuning, rigl" in (ledger.folder / "analysis" / "report.html").read_text("utf-8")
    assert "## RQ5: Do masks" in (Path(ledger.folder) / "analysis" / "findings.md").read_text("utf-8")
