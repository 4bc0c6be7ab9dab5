"""The report: the audit, tables, figures, findings, and what they say in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from analysis.audit.audit import audit
from analysis.audit.protocol import differing_settings
from analysis.baselines.published import load_published
from analysis.read.chosen import compared_cells
from analysis.read.load import cells_table, found_curves
from analysis.read.results import Results, read_results
from analysis.read.seeds import SETTING, axis_columns, over_seeds, primary_words, repeated_settings
from analysis.report.choices import choice_lines, choices_table
from analysis.report.latex import main_results
from analysis.report.page import Content, render_claim, summarise_audit
from analysis.report.presentation import present
from analysis.report.result_table import MOST_LINES, result_lines
from analysis.report.runs import find_runs
from analysis.report.tables import (
    grouped_summary,
    highest_passing_sparsity,
    with_imported,
    with_intervals,
    with_warnings,
)
from analysis.stats.claims import as_markdown, headlines
from analysis.stats.comparisons import BASE, Points
from analysis.stats.findings import describe_seeds, make_claims
from analysis.stats.sparsity_claims import PASS_MARK
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.files import write_json, write_text
from tune_sparse.ledger.curves import KEY, KnownCurve, curve_lines
from tune_sparse.ledger.reader import MergedLedger
from tune_sparse.modes import MODES
from tune_sparse.schedules import ONE_SHOT


@dataclass(frozen=True)
class Report:
    """The lines to print, how many errors the audit named, and how many cells are done."""

    lines: list[str]
    errors: int
    done: int


def write_report(
    results_dirs: Sequence[Path],
    sweep_ids: Sequence[str] | None = None,
    baselines: Sequence[Path] = (),
    primary_metrics: Mapping[str, str] = MappingProxyType({}),
) -> Report:
    """Audit the folders and write `analysis/` in the first of them.

    summary.csv has every cell, done or not, and what the audit says of its run; everything else is made of done cells
    alone, and where sweeps had axes, of the chosen setting of each cell; choices.csv has how it was chosen.
    `sweep_ids` names the sweeps to report on, all of them if None; `baselines` are files of published numbers;
    `primary_metrics`, {task: metric}, chooses again what tasks are judged by.
    Raises `NotReadyError` if there is no sweep, `InputError` if sweeps of different protocols, weights or examples
    would be mixed, or a file of published numbers breaks a rule.
    """
    requested = cells_table(results_dirs, sweep_ids, primary_metrics)
    if requested.empty:
        raise NotReadyError(
            f"a report needs a sweep, {', '.join(map(str, results_dirs))} has none. Run `tune-sparse sweep` first."
        )
    cells = compared_cells(requested)
    results = read_results(results_dirs, sweep_ids, primary_metrics)
    _check_one_protocol(cells, results)
    published = load_published(baselines, set(cells["model"]))
    folder = results_dirs[0] / "analysis"
    folder.mkdir(exist_ok=True)
    found = audit(results)
    cells = with_intervals(cells)
    shown, summary = (
        with_warnings(with_intervals(with_imported(some, results.imported)), found) for some in (cells, requested)
    )
    points = Points(cells, {run_id: e.predictions for run_id, e in results.by_run.items() if e.predictions})
    claims, tests = make_claims(points, results.imported)
    performance = over_seeds(cells)
    found_ones = found_curves(MergedLedger(results_dirs), sweep_ids)
    whole = without_curves(performance, found_ones)
    metrics = f"Accuracy is by the primary metric of its task: {primary_words(performance) or 'unknown'}."
    tables = {"summary": summary, "sparsity_vs_performance": performance, "tests": tests}
    tables |= {"choices": choices_table(requested)} if axis_columns(requested) else {}
    for name, table in (tables | {"grouped_summary": grouped_summary(points)}).items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    write_text(folder / "main_results.tex", main_results(shown))
    notes = (found.summary(), describe_seeds(cells), metrics, *choice_lines(requested))
    write_text(folder / "findings.md", as_markdown(claims, *notes))
    write_json(folder / "findings.json", [claim.as_json() for claim in claims])
    write_json(folder / "audit.json", [asdict(finding) for finding in found.findings])
    content = Content(
        counts=counts(requested)[0],
        cells=shown,
        folders=results_dirs,
        audit=summarise_audit(found),
        findings=[render_claim(claim) for claim in claims],
        seeds=describe_seeds(cells),
        passing=highest_passing_sparsity(whole),
        choices=choice_lines(requested),
    )
    page = present(folder, content, find_runs(results_dirs, points.predictions), published)
    said_first = [*found.lines(severities=["error"]), *counts(requested), found.summary()]
    lines = [*said_first, *result_lines(cells, found, MOST_LINES)]
    lines += [*(headlines(claims) or [describe_seeds(cells)]), *highest_lines(whole), *bracket_lines(found_ones)]
    lines += choice_lines(requested)
    lines += [f"Tables, figures, findings and audit: {folder}", f"To read: {page}"]
    return Report(lines, len(found.errors), int((requested["status"] == "done").sum()))


def _check_one_protocol(cells: pd.DataFrame, results: Results) -> None:
    repeated = repeated_settings(cells)
    if repeated.empty:
        return
    first = repeated.iloc[0]
    same = repeated[(repeated[[*SETTING, "seed"]] == first[[*SETTING, "seed"]]).all(axis=1)]
    names = [s.sweep_id for s in results.sweeps if {cell["cell_id"] for cell in s.cells} & set(same["cell_id"])]
    runs = [results.by_run[run_id].run for run_id in same["run_id"] if run_id in results.by_run]
    differing = differing_settings(*runs[:2]) if len(runs) > 1 else {}
    values = "".join(f", {name} {str(a)[:12]} and {str(b)[:12]}" for name, (a, b) in differing.items())
    candidates = dict.fromkeys(same["candidates"])
    values += f", chosen among {' and '.join(of or 'one' for of in candidates)}" if len(candidates) > 1 else ""
    raise InputError(
        "a report must not mix sweeps that differ in protocol, weights or examples, got one setting twice: "
        f"{first['cell_id']} in {' and '.join(dict.fromkeys(names))}{values}. Name one with --sweep."
    )


def without_curves(performance: pd.DataFrame, curves: Sequence[KnownCurve]) -> pd.DataFrame:
    """The table without curves that have levels that no run was needed for: a gap would seem to end them."""
    keys = {curve.curve.key[:-1] for curve in curves}
    rows = zip(*(performance[name] for name in KEY[:-1]), strict=True)
    return performance[[key not in keys for key in rows]]


def bracket_lines(curves: Sequence[KnownCurve]) -> list[str]:
    """Between which levels each curve of `--find` stops passing."""
    return ["By --find, untested:", *(f"  {line}" for line in curve_lines(curves))] if curves else []


def counts(cells: pd.DataFrame) -> list[str]:
    """Count the cells of each status, in one line."""
    statuses = cells["status"].value_counts()
    done = cells[cells["status"] == "done"]
    named = ", ".join(f"{count} {status}" for status, count in statuses.items())
    return [
        f"{len(cells)} cells: {named}; {done['run_id'].nunique()} distinct runs, "
        f"{int(done['shared_with'].notna().sum())} cells point to the run they share."
    ]


def highest_lines(performance: pd.DataFrame) -> list[str]:
    """The highest sparsity that keeps each task within the pass mark of its dense baseline, by method, mode and
    schedule; of each backend where there are several."""
    passing = highest_passing_sparsity(performance)
    if passing.empty:
        return []
    lines = [f"Highest sparsity with accuracy, or perplexity, within {PASS_MARK:.0%} of the dense baseline, untested:"]
    several = passing["backend"].nunique() > 1
    for (backend, model, task, mode), rows in passing.groupby([*BASE, "dense_mode"], sort=False):
        first, on = rows.iloc[0], f" on {backend}" if several else ""
        on += "" if MODES[str(mode)].has_adapter else f" by {mode}"
        lines.append(f"  {model}, {task}{on} (dense {first['metric']} {first['dense']:.3f}):")
        for method, same in rows.groupby("method", sort=False):
            tuned = same["mode"].where(same["schedule"] == ONE_SHOT, same["mode"] + " " + same["schedule"])
            reached = zip(tuned, same["highest_sparsity"], strict=True)
            modes = ", ".join(f"{mode} {_or_none(highest)}" for mode, highest in reached)
            lines.append(f"    {method:14} {modes}")
    return lines


def _or_none(sparsity: float) -> str:
    return "unknown (dense is not above chance)" if pd.isna(sparsity) else f"{sparsity:g}"
