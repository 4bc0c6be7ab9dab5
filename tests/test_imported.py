"""Numbers from elsewhere: taken in as a kind of their own, seen as such everywhere, never taken for runs."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from sound import make_cells, sound_ledger

from analysis.read.imported import Imported, imported_records
from analysis.report.report import write_report
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, OK
from tune_sparse.errors import InputError

HEADER = "model,task,accuracy,source,n_examples\n"


def imported(folder: Path, text: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "dense.csv").write_text(text)
    return main(["import", str(folder / "dense.csv"), "--results-dir", str(folder)])


def test_rows_become_records_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = HEADER + "tiny,boolq,0.93,our study of 2024,400\ntiny,gsm8k,0.5,lab B,\n"
    for _ in range(2):
        assert imported(tmp_path, text) == OK
    assert "tiny, boolq: 0.93 (imported from our study of 2024)" in capsys.readouterr().out
    assert sorted(imported_records(tmp_path), key=lambda record: record.task) == [
        Imported("tiny", "boolq", 0.93, "our study of 2024", 400),
        Imported("tiny", "gsm8k", 0.5, "lab B", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEADER + "tiny,boolq,93,us,400\n",
            r"dense\.csv:2: an accuracy is a fraction .* got 93\. Did you mean 0\.93\?",
        ),
        (HEADER + "tiny,boolq,-1,us,400\n", r"got -1\. Give a fraction\."),
        (HEADER + "tiny,boolq,high,us,400\n", r"dense\.csv:2: could not convert string to float: 'high'"),
        (HEADER + "tiny,bolq,0.9,us,400\n", r"dense\.csv:2: unknown task 'bolq'\. Did you mean 'boolq'"),
        (HEADER + "tiny,boolq,0.9,,400\n", r"model and source must not be empty"),
        (HEADER, r"must have at least one row under its header, got none"),
        ("model,task,accuracy\n", r"it has no source\. Add them\."),
        ("model,task,accuracy,sauce\n", r"unknown column 'sauce'\. Did you mean 'source'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert imported(tmp_path, text) == BAD_INPUT
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "imported").exists()


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert main(["import", str(tmp_path / "none.csv"), "--results-dir", str(tmp_path)]) == BAD_INPUT


def test_a_record_that_was_broken_later_is_refused(tmp_path: Path) -> None:
    imported(tmp_path, HEADER + "tiny,boolq,0.9,us,400\n")
    [path] = (tmp_path / "imported").iterdir()
    path.write_text(path.read_text().replace("0.9", "9"))
    with pytest.raises(InputError, match=r"an accuracy is a fraction"):
        imported_records(tmp_path)


def test_an_imported_number_is_seen_as_such(tmp_path: Path) -> None:
    ledger = sound_ledger(tmp_path / "results", make_cells(methods=("random",)))
    imported(ledger.folder, HEADER + "tiny,boolq,0.93,lab B,400\n")
    lines = write_report([ledger.folder]).lines
    folder = ledger.folder / "analysis"
    summary = pd.read_csv(folder / "summary.csv")
    [row] = summary[summary["status"] == "imported"].to_dict("records")
    assert (row["backend"], row["accuracy"], row["n_examples"]) == ("imported", 0.93, 400)
    assert row["warnings"] == "imported"
    assert row["accuracy_low"] < 0.93 < row["accuracy_high"]
    assert lines[0].startswith("6 cells: 6 done;")
    assert "imported" not in (folder / "sparsity_vs_performance.csv").read_text()
    assert "dense (imported) & 93.0" in (folder / "main_results.tex").read_text()
    assert "imported baseline 0.930 (lab B)" in (folder / "findings.md").read_text()
    assert "tiny, boolq: 0.93 was imported from lab B" in (folder / "audit.json").read_text()
