"""The first report: tables, figures, and what they say in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.load import cells_table
from analysis.page import Audited
from analysis.presentation import present
from analysis.tables import PASS_MARK, SETTING, highest_passing_sparsity, sparsity_vs_performance
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.paths import write_text


def write_report(
    results_dirs: Sequence[Path], sweep_ids: Sequence[str] | None = None, baselines: Sequence[Path] = ()
) -> list[str]:
    """Write `analysis/` in the first results folder; returns the findings as lines.

    summary.csv has every cell, done or not; everything else is made of done cells alone. `sweep_ids` names the
    sweeps to report on, all of them if None. Raises `NotReadyError` if there is no sweep, `InputError` if
    sweeps of different protocols, weights or rows would be mixed.
    """
    cells = cells_table(results_dirs, sweep_ids)
    if cells.empty:
        raise NotReadyError(
            f"a report needs a sweep, {', '.join(map(str, results_dirs))} has none. Run `tune-sparse sweep` first."
        )
    _refuse_mixed_sweeps(cells)
    folder = results_dirs[0] / "analysis"
    folder.mkdir(exist_ok=True)
    write_text(folder / "summary.csv", cells.to_csv(index=False))
    performance = sparsity_vs_performance(cells)
    write_text(folder / "sparsity_vs_performance.csv", performance.to_csv(index=False))
    page = present(
        folder,
        results_dirs,
        cells,
        counts(cells)[0],
        highest_passing_sparsity(performance),
        PASS_MARK,
        Audited("notice", "Not audited."),
        published_files=baselines,
    )
    return [*counts(cells), *findings(performance), f"Tables and figures: {folder}", f"To read: {page}"]


def _refuse_mixed_sweeps(cells: pd.DataFrame) -> None:
    repeated = cells[cells.duplicated([*SETTING, "seed"], keep=False)]
    if not repeated.empty:
        raise InputError(
            "a report must not mix sweeps that differ in protocol, weights or rows, got one setting twice: "
            f"{', '.join(repeated['cell_id'].iloc[:2])}. Name sweeps with --sweep; they are the files under sweeps/."
        )


def counts(cells: pd.DataFrame) -> list[str]:
    """How many cells have which status."""
    statuses = cells["status"].value_counts()
    done = cells[cells["status"] == "done"]
    named = ", ".join(f"{count} {status}" for status, count in statuses.items())
    return [
        f"{len(cells)} cells: {named}; {done['run_id'].nunique()} distinct runs, "
        f"{int(done['shared_with'].notna().sum())} cells point to the run they share."
    ]


def findings(performance: pd.DataFrame) -> list[str]:
    """The highest sparsity that keeps each task within the pass mark of its dense baseline, by method and mode."""
    passing = highest_passing_sparsity(performance)
    if passing.empty:
        return []
    lines = [f"Highest sparsity with accuracy, or perplexity, within {PASS_MARK:.0%} of the dense baseline:"]
    for (model, task), rows in passing.groupby(["model", "task"], sort=False):
        first = rows.iloc[0]
        lines.append(f"  {model}, {task} (dense {first['metric']} {first['dense']:.3f}):")
        for method, by_mode in rows.groupby("method", sort=False):
            reached = zip(by_mode["mode"], by_mode["highest_sparsity"], strict=True)
            modes = ", ".join(f"{mode} {_or_none(highest)}" for mode, highest in reached)
            lines.append(f"    {method:14} {modes}")
    return lines


def _or_none(sparsity: float) -> str:
    return "unknown (dense is not above chance)" if pd.isna(sparsity) else f"{sparsity:g}"
