"""Tables, figures and findings from ledgers written by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from factories import done_record, failed_record, make_cell, make_run, make_sweep, write_run
from PIL import Image
from sound import PROTOCOL, edit, make_cells, sound_ledger

from analysis.audit.audit import audit_folders
from analysis.read.load import COLUMNS, cells_table
from analysis.report.figures import FIGURES
from analysis.report.report import counts, write_report
from analysis.report.result_table import result_lines
from analysis.report.tables import highest_passing_sparsity
from tune_sparse.cli import main
from tune_sparse.cli.command import FAULT
from tune_sparse.config import Cell, Protocol
from tune_sparse.errors import InputError
from tune_sparse.ledger.ledger import Ledger

MODES = ("sparse-to-dense", "sparse-to-sparse")
SUMMARY = (
    "cell_id,run_id,shared_with,backend,model,task,method,sparsity,actual_sparsity,mode,schedule,seed,protocol_id,status,primary_metric,"
    "accuracy,"
    "accuracy_stderr,accuracy_before_tuning,accuracy_before_merge,chance_accuracy,n_examples,majority_fraction,most_frequent_fraction,"
    "truncated_fraction,cut_fraction,acc,acc_stderr,acc_before_tuning,acc_before_merge,"
    "acc_norm,acc_norm_stderr,acc_norm_before_tuning,acc_norm_before_merge,"
    "exact_match_strict,exact_match_strict_stderr,exact_match_strict_before_tuning,exact_match_strict_before_merge,"
    "exact_match_flexible,exact_match_flexible_stderr,exact_match_flexible_before_tuning,exact_match_flexible_before_merge,"
    "perplexity,perplexity_stderr,perplexity_before_tuning,perplexity_before_merge,f1,f1_stderr,bits_per_byte,"
    "train_loss,eval_loss,eval_loss_before_mask,"
    "train_examples_per_second,train_tokens_per_second,train_seconds,trial_seconds,peak_memory_bytes,cell_peak_memory_bytes,compile_seconds,"
    "calibration_tokens_seen,inference_flops,hardware,calibration,calibration_order,error,"
    "candidates,chosen,choice,comparable"
)
NUMBERS = SUMMARY.split(",")[15:19] + SUMMARY.split(",")[20:52] + ["actual_sparsity"]
"""Columns that only a finished run can fill."""


def matrix(sparsities: Iterable[float], **changes: Any) -> list[Cell]:
    return [make_cell(sparsity=s, mode=mode, **changes) for mode in MODES for s in sparsities]


def write_done(ledger: Ledger, cells: Iterable[Cell], **run_changes: Any) -> None:
    """A done run for each cell, with accuracy 0.9 at sparsity 0, less above."""
    for cell in {cell.trained for cell in cells}:
        run = make_run(cell, **run_changes)
        write_run(ledger, run, done_record(run, accuracy=0.9 - cell.sparsity / 2))


@pytest.fixture(autouse=True)
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_figures.py draws the others."""
    drawn = {name: FIGURES[name] for name in ("sparsity_vs_accuracy", "sparsity_vs_perplexity", "sparsity_vs_loss")}
    monkeypatch.setattr("analysis.report.presentation.FIGURES", drawn)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


@pytest.fixture
def mixed(ledger: Ledger) -> pd.DataFrame:
    """Six cells: at 0 two that share a run, at 0.5 two done, at 0.9 one failed and one missing; by sparsity, mode."""
    cells = matrix((0.0, 0.5, 0.9))
    ledger.write_sweep(make_sweep(cells))
    write_done(ledger, [cell for cell in cells if cell.sparsity < 0.9])
    failed = make_run(cells[2])
    write_run(ledger, failed, failed_record(failed))
    return cells_table([ledger.folder]).set_index(["sparsity", "mode"], drop=False)


def test_the_columns_are_those_of_the_design(mixed: pd.DataFrame) -> None:
    assert ",".join(mixed.columns) == ",".join(COLUMNS) == SUMMARY


def test_there_is_one_row_a_cell(mixed: pd.DataFrame) -> None:
    assert len(mixed) == mixed["cell_id"].nunique() == 6


def test_a_done_cell_has_its_numbers(mixed: pd.DataFrame) -> None:
    row = mixed.loc[0.5, "sparse-to-sparse"]
    assert (row["status"], row["accuracy"], row["actual_sparsity"]) == ("done", 0.65, 0.5)
    assert (row["accuracy_before_tuning"], row["chance_accuracy"], row["n_examples"]) == (0.5, 0.5, 200)
    assert (row["train_seconds"], row["inference_flops"], row["hardware"]) == (2.0, 2_000, "abacus")
    assert pd.isna(row["compile_seconds"])
    assert pd.isna(row["error"])


def test_a_failed_cell_has_its_reason_and_no_numbers(mixed: pd.DataFrame) -> None:
    row = mixed.loc[0.9, "sparse-to-dense"]
    assert (row["status"], row["error"]) == ("failed", "RunError: the loss is nan at step 7")
    assert row[NUMBERS].isna().all()


def test_a_missing_cell_has_a_reason_and_no_numbers(mixed: pd.DataFrame) -> None:
    row = mixed.loc[0.9, "sparse-to-sparse"]
    assert row["status"] == "missing"
    assert row[NUMBERS].isna().all()
    assert isinstance(row["error"], str)


def test_an_interrupted_cell_has_a_reason_and_no_numbers(ledger: Ledger) -> None:
    run = make_run()
    ledger.write_sweep(make_sweep([run.cell]))
    ledger.write_record(run, replace(failed_record(run), status="interrupted", error=None))
    [row] = cells_table([ledger.folder]).to_dict("records")
    assert row["status"] == "interrupted"
    assert isinstance(row["error"], str)


def test_a_shared_run_is_pointed_to_and_counted_once(mixed: pd.DataFrame) -> None:
    owner, sharer = mixed.loc[0.0, "sparse-to-dense"], mixed.loc[0.0, "sparse-to-sparse"]
    assert sharer["shared_with"] == owner["cell_id"]
    assert sharer["run_id"] == owner["run_id"]
    assert sharer["accuracy"] == owner["accuracy"] == 0.9
    assert mixed["shared_with"].notna().sum() == 1
    assert counts(mixed) == [
        "6 cells: 4 done, 1 failed, 1 missing; 3 distinct runs, 1 cells point to the run they share."
    ]


def test_two_sweeps_of_one_folder_share_a_run_only_once(ledger: Ledger) -> None:
    cells = matrix((0.0, 0.5))
    ledger.write_sweep(make_sweep(cells[2:], started=1.0))
    ledger.write_sweep(make_sweep(cells, started=2.0))
    write_done(ledger, cells)
    table = cells_table([ledger.folder])
    assert len(table) == 4
    owners = table[table["shared_with"].isna()]
    assert owners["run_id"].is_unique
    assert set(table["shared_with"].dropna()) <= set(owners["cell_id"])


def two_folders(tmp_path: Path, first: str, second: str) -> dict[str, Any]:
    """The one row of a cell that two folders have, with a record each: done, failed or missing."""
    run = make_run()
    makers = {"done": lambda: done_record(run, accuracy=0.8), "failed": lambda: failed_record(run)}
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, status in zip(folders, (first, second), strict=True):
        Ledger(folder).write_sweep(make_sweep([run.cell]))
        if status in makers:
            write_run(Ledger(folder), run, makers[status]())
    [row] = cells_table(folders).to_dict("records")
    return row


@pytest.mark.parametrize("other", ["failed", "missing"])
@pytest.mark.parametrize("done_first", [True, False])
def test_of_two_folders_the_done_run_wins(tmp_path: Path, other: str, done_first: bool) -> None:
    statuses = ("done", other) if done_first else (other, "done")
    row = two_folders(tmp_path, *statuses)
    assert (row["status"], row["accuracy"]) == ("done", 0.8)
    assert pd.isna(row["error"])


@pytest.mark.parametrize("statuses", [("failed", "missing"), ("missing", "failed")])
def test_of_two_folders_a_failure_is_not_hidden_by_a_missing_run(tmp_path: Path, statuses: tuple[str, str]) -> None:
    row = two_folders(tmp_path, *statuses)
    assert (row["status"], row["error"]) == ("failed", "RunError: the loss is nan at step 7")


def test_of_two_done_runs_the_first_folder_counts(tmp_path: Path) -> None:
    run = make_run()
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, accuracy in zip(folders, (0.6, 0.7), strict=True):
        Ledger(folder).write_sweep(make_sweep([run.cell]))
        write_run(Ledger(folder), run, done_record(run, accuracy))
    assert cells_table(folders)["accuracy"].tolist() == [0.6]


def test_an_empty_folder_has_an_empty_table(tmp_path: Path) -> None:
    table = cells_table([tmp_path])
    assert table.empty
    assert tuple(table.columns) == COLUMNS


def test_runs_of_different_protocols_are_never_averaged(ledger: Ledger) -> None:
    cell = make_cell()
    for steps, accuracy in ((100, 0.6), (200, 0.8)):
        protocol = Protocol(steps=steps)
        run = make_run(cell, protocol=protocol)
        ledger.write_sweep(make_sweep([cell], started=float(steps), protocol=protocol))
        write_run(ledger, run, done_record(run, accuracy))
    with pytest.raises(InputError, match="must not mix sweeps that differ in protocol"):
        write_report([ledger.folder])
    [first, second] = [sweep.sweep_id for sweep in ledger.sweeps()]
    for sweep_id, accuracy in ((first, 0.6), (second, 0.8)):
        write_report([ledger.folder], [sweep_id])
        assert pd.read_csv(ledger.folder / "analysis" / "summary.csv")["accuracy"].tolist() == [accuracy]


def test_a_report_that_is_refused_names_sweeps_and_the_setting_that_differs(tmp_path: Path) -> None:
    for n_test, started in ((400, 1000.0), (390, 2000.0)):
        sound_ledger(tmp_path, make_cells(sparsities=(0.3,)), replace(PROTOCOL, n_test=n_test), started=started)
    with pytest.raises(InputError, match=r"in sweep1000 and sweep2000, n_test 400 and 390, data_fingerprint"):
        write_report([tmp_path])
    assert not (tmp_path / "analysis").exists()


def performance(accuracies: dict[float, float], **setting: Any) -> pd.DataFrame:
    names = {
        "backend": "torch",
        "model": "tiny",
        "task": "boolq",
        "method": "random",
        "mode": "sparse-to-dense",
        "schedule": "one-shot",
    }
    names |= {"chance_accuracy": 0.5, "accuracy_stderr": 0.03, "seeds": 1, "seeds_done": 1, "perplexity": None}
    names["n_examples"] = 200
    return pd.DataFrame([names | setting | {"sparsity": s, "accuracy": a} for s, a in accuracies.items()])


@pytest.mark.parametrize(
    ("accuracies", "highest"),
    [
        ({0.0: 0.8, 0.5: 0.72, 0.9: 0.5}, 0.5),
        ({0.0: 0.8, 0.5: 0.71, 0.9: 0.8}, 0.0),
        ({0.0: 0.8, 0.3: 0.79, 0.5: 0.6, 0.7: 0.8, 0.9: 0.6}, 0.3),
        ({0.9: 0.9, 0.5: 0.85, 0.0: 0.8}, 0.9),
        ({0.0: 0.8}, 0.0),
    ],
)
def test_the_highest_passing_sparsity_is_before_the_first_dip(accuracies: dict[float, float], highest: float) -> None:
    [row] = highest_passing_sparsity(performance(accuracies)).to_dict("records")
    assert (row["dense"], row["highest_sparsity"]) == (0.8, highest)


@pytest.mark.parametrize(
    ("perplexities", "highest"),
    [({0.0: 10.0, 0.3: 11.0, 0.5: 11.1, 0.9: 10.0}, 0.3), ({0.0: 10.0, 0.5: 9.0}, 0.5), ({0.0: 10.0, 0.5: 12.0}, 0.0)],
)
def test_perplexity_passes_while_it_is_low(perplexities: dict[float, float], highest: float) -> None:
    table = performance(dict.fromkeys(perplexities, float("nan")), chance_accuracy=None, accuracy_stderr=None)
    table["perplexity"] = table["sparsity"].map(perplexities)
    [row] = highest_passing_sparsity(table).to_dict("records")
    assert (row["metric"], row["dense"], row["highest_sparsity"]) == ("perplexity", 10.0, highest)


def test_a_text_is_drawn_by_its_perplexity(ledger: Ledger) -> None:
    cells = matrix((0.0, 0.5), task="wikitext2")
    sweep = make_sweep(cells)
    ledger.write_sweep(replace(sweep, cells=tuple(cell | {"chance": None} for cell in sweep.cells)))
    for cell in {cell.trained for cell in cells}:
        metrics = {"perplexity": 10 + cell.sparsity, "perplexity_stderr": 0.5, "perplexity_before_tuning": 20.0}
        record = done_record(make_run(cell), **metrics)
        kept = {name: value for name, value in record.metrics.items() if not name.startswith("accuracy")}
        write_run(ledger, make_run(cell), replace(record, metrics=kept))
    lines = write_report([ledger.folder]).lines
    assert "  tiny, wikitext2 (dense perplexity 10.000):" in lines
    assert "    unstructured   sparse-to-dense 0.5, sparse-to-sparse 0.5" in lines
    figures = {path.name for path in (ledger.folder / "analysis").glob("*.png")}
    assert figures == {"sparsity_vs_perplexity.png", "sparsity_vs_loss.png"}


def test_nothing_is_said_beyond_a_cell_that_is_not_done() -> None:
    gap = performance({0.0: 0.8, 0.3: 0.8, 0.5: 0.8, 0.9: 0.8})
    gap.loc[gap["sparsity"] == 0.5, "seeds_done"] = 0
    assert highest_passing_sparsity(gap)["highest_sparsity"].tolist() == [0.3]


def test_without_a_dense_baseline_nothing_is_said() -> None:
    curves = [performance({0.1: 0.8, 0.5: 0.8}), performance({0.0: 0.8, 0.5: 0.8}, mode="sparse-to-sparse")]
    assert highest_passing_sparsity(pd.concat(curves))["mode"].tolist() == ["sparse-to-sparse"]


@pytest.mark.parametrize("dense", [0.0, 0.5, 0.55])
def test_a_dense_baseline_near_chance_is_not_kept_at_any_sparsity(dense: float) -> None:
    table = highest_passing_sparsity(performance({0.0: dense, 0.9: dense}))
    assert table["highest_sparsity"].isna().all()


def test_seeds_that_agree_near_chance_are_no_proof_of_being_above_it() -> None:
    """Their deviation is small, and says nothing of the examples."""
    table = performance({0.0: 0.55, 0.9: 0.55}, accuracy_stderr=None, accuracy_sd=0.001, seeds=3, seeds_done=3)
    assert highest_passing_sparsity(table)["highest_sparsity"].isna().all()
    assert highest_passing_sparsity(table.assign(n_examples=10_000))["highest_sparsity"].tolist() == [0.9]


REPORT_FILES = {
    *("report.html", "published_comparison.csv", "phoenix_comparison.tex"),
    *("sparsity_vs_accuracy.pdf", "sparsity_vs_loss.pdf"),
    *("summary.csv", "grouped_summary.csv", "sparsity_vs_performance.csv", "tests.csv", "main_results.tex"),
    *("findings.md", "findings.json", "audit.json", "sparsity_vs_accuracy.png", "sparsity_vs_loss.png"),
}


def test_a_report_has_tables_figures_and_lines(tmp_path: Path) -> None:
    """Of six cells: two that share a run, two done, one failed, one missing."""
    cells = make_cells(methods=("unstructured",), sparsities=(0.0, 0.3))
    ledger = sound_ledger(tmp_path, cells)
    lost = make_cells(methods=("unstructured",), sparsities=(0.9,))
    rows = [{**vars(cell), "cell_id": f"lost{i}", "run_id": make_run(cell).run_id} for i, cell in enumerate(lost)]
    [sweep] = ledger.sweeps()
    ledger.write_sweep(replace(sweep, cells=(*sweep.cells, *({**sweep.cells[0], **row} for row in rows))))
    ledger.write_record(make_run(lost[0]), failed_record(make_run(lost[0])))
    report, folder = write_report([tmp_path]), tmp_path / "analysis"
    bounds = ("Results:", "With one seed, differences are described")
    start, end = (next(i for i, line in enumerate(report.lines) if line.startswith(text)) for text in bounds)
    printed = report.lines[start:end]
    assert printed == result_lines(cells_table([tmp_path]), audit_folders([tmp_path]))
    assert report.lines[:start] + report.lines[end + 1 :] == [
        "6 cells: 4 done, 1 failed, 1 missing; 3 distinct runs, 1 cells point to the run they share.",
        "Audit of 3 runs: no error; warnings: 2 missing.",
        "Highest sparsity with accuracy, or perplexity, within 10% of the dense baseline, untested:",
        f"  tiny, boolq (dense accuracy {dense_accuracy(folder):.3f}):",
        "    unstructured   sparse-to-dense 0, sparse-to-sparse 0.3",
        f"Tables, figures, findings and audit: {folder}",
        f"To read: {folder / 'report.html'}",
    ]
    assert {path.name for path in folder.iterdir()} == REPORT_FILES
    header = (folder / "summary.csv").read_text().splitlines()[0]
    assert header == f"{SUMMARY},accuracy_low,accuracy_high,warnings"
    summary = pd.read_csv(folder / "summary.csv")
    assert summary["warnings"].fillna("").tolist() == [""] * 4 + ["missing"] * 2
    performance = pd.read_csv(folder / "sparsity_vs_performance.csv")
    assert (len(performance), performance["seeds_done"].sum()) == (6, 4)
    for name in ("sparsity_vs_accuracy.png", "sparsity_vs_loss.png"):
        with Image.open(folder / name) as image:
            image.verify()
            assert min(image.size) > 100


def dense_accuracy(folder: Path) -> float:
    return pd.read_csv(folder / "summary.csv").query("sparsity == 0")["accuracy"].iloc[0]


def test_a_report_says_errors_first_and_keeps_what_is_faulty(tmp_path: Path) -> None:
    ledger = sound_ledger(tmp_path, make_cells(methods=("unstructured",), sparsities=(0.0, 0.3)))
    [run_id] = {cell["run_id"] for cell in ledger.sweeps()[0].cells if cell["mode"] == "sparse-to-dense"} - {
        cell["run_id"] for cell in ledger.sweeps()[0].cells if cell["sparsity"] == 0
    }
    edit(ledger.run_folder(run_id) / "result.json", metrics={"accuracy": 0.99})
    report = write_report([tmp_path])
    assert report.errors == 1
    assert report.lines[0] == "error unproven-number: a number that no run stands behind"
    assert report.lines[1].startswith(f"  {run_id}: the recorded accuracy is 0.99")
    summary = pd.read_csv(tmp_path / "analysis" / "summary.csv").set_index("run_id")
    assert (summary.loc[run_id, "accuracy"], summary.loc[run_id, "warnings"]) == (0.99, "UNPROVEN-NUMBER")
    assert re.search(r"99\.0\\,\(\d\.\d\)\\textdaggerdbl", (tmp_path / "analysis" / "main_results.tex").read_text())
    assert main(["report", "--results-dir", str(tmp_path)]) == FAULT


def test_a_broken_record_is_a_missing_cell_and_the_rest_is_reported(tmp_path: Path) -> None:
    ledger = sound_ledger(tmp_path, make_cells(methods=("unstructured",), sparsities=(0.0, 0.3)))
    run_id = ledger.sweeps()[0].cells[-1]["run_id"]
    (ledger.run_folder(run_id) / "result.json").write_text('{"run_id"')
    (tmp_path / "sweeps" / "half.json").write_text("{")
    report = write_report([tmp_path])
    assert report.errors == 2
    assert "4 cells: 3 done, 1 missing; 2 distinct runs, 1 cells point to the run they share." in report.lines


def test_a_report_of_nothing_but_failures_has_no_figures(ledger: Ledger) -> None:
    run = make_run()
    ledger.write_sweep(make_sweep([run.cell]))
    write_run(ledger, run, failed_record(run))
    lines = write_report([ledger.folder]).lines
    assert lines[0].startswith("1 cells: 1 failed; 0 distinct runs")
    assert not list((ledger.folder / "analysis").glob("*.png"))


def test_a_report_of_dense_runs_alone_has_no_accuracy_before_a_merge(ledger: Ledger) -> None:
    cells = [make_cell(sparsity=0.0, mode="dense", method=method) for method in ("none", "random")]
    ledger.write_sweep(make_sweep(cells))
    write_done(ledger, cells)
    write_report([ledger.folder])
    table = pd.read_csv(ledger.folder / "analysis" / "sparsity_vs_performance.csv")
    assert table["accuracy"].tolist() == [0.9, 0.9]
    assert table["accuracy_before_merge"].isna().all()


def test_a_report_is_written_into_the_first_of_several_folders(tmp_path: Path) -> None:
    for name, sparsity, started in (("one", 0.0, 1000.0), ("two", 0.5, 2000.0)):
        cells = matrix([sparsity])
        Ledger(tmp_path / name).write_sweep(make_sweep(cells, started))
        write_done(Ledger(tmp_path / name), cells)
    lines = write_report([tmp_path / "one", tmp_path / "two"]).lines
    assert any(line.startswith("4 cells: 4 done") for line in lines)
    assert not (tmp_path / "two" / "analysis").exists()


def test_a_report_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"a report needs a sweep, {tmp_path} has none\. Run `tune-sparse sweep`"):
        write_report([tmp_path])
