"""Writes what people read: figures, the comparison with published numbers, and the HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.baselines.comparison import PublishedComparison, compare_with_published, protocols
from analysis.baselines.published import COLUMNS, Published
from analysis.read.chosen import rates_words
from analysis.read.dynamics import dynamics_table
from analysis.report.dynamics_rows import dynamics_rows
from analysis.report.figures import FIGURES
from analysis.report.hardware import hardware_pairs, hardware_rows, published_rates
from analysis.report.page import Content, render_page
from analysis.report.phoenix import phoenix_table
from analysis.report.runs import Runs
from analysis.report.style import save
from tune_sparse.files import write_text

PAGE = "report.html"
COMPARED = ("reason", "ours", "difference", "low", "high", "verdict", "our_setting", "seeds", "settings", "run_ids")


def present(folder: Path, content: Content, runs: Runs, published: Sequence[Published]) -> Path:
    """Draw every figure that has something to show, write the comparisons, and the page; returns the page's path.

    `content` has what the audit and the statistics found; hardware, dynamics, comparisons and figures are added here.
    """
    cells = content.cells
    comparisons = compare_with_published(published, cells, protocols(runs.ledger))
    write_text(folder / "published_comparison.csv", _as_csv(comparisons))
    write_text(folder / "phoenix_comparison.tex", phoenix_table(comparisons))
    pairs = hardware_pairs(cells, runs)
    dynamics = dynamics_table(cells, runs.dynamics(cells["run_id"]))
    for name, table in (("hardware_comparison", pairs), ("dynamics", dynamics)):
        (folder / f"{name}.csv").unlink(missing_ok=True)
        if not table.empty:
            write_text(folder / f"{name}.csv", table.to_csv(index=False))
    page = folder / PAGE
    figures = draw_figures(folder, cells, runs)
    whole = replace(
        content,
        comparisons=comparisons,
        hardware=hardware_rows(pairs),
        dynamics=dynamics_rows(dynamics),
        published_rates=published_rates(published),
        figures=figures,
    )
    write_text(page, render_page(whole, page))
    return page


def draw_figures(folder: Path, cells: pd.DataFrame, runs: Runs) -> dict[str, str]:
    """{name: caption} of the figures that were drawn; one of an earlier report that has nothing to show now goes."""
    drawn, rates = {}, rates_words(cells)
    for name, shown in FIGURES.items():
        path = folder / f"{name}.png"
        figure = shown.draw(cells, runs)
        if figure is not None:
            save(figure, path)
            drawn[name] = shown.caption.format(rates=rates)
        else:
            path.unlink(missing_ok=True)
            path.with_suffix(".pdf").unlink(missing_ok=True)
    return drawn


def _as_csv(comparisons: Sequence[PublishedComparison]) -> str:
    """Every published number with what stands beside it, or why nothing does."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*COLUMNS, *COMPARED], lineterminator="\n")
    writer.writeheader()
    for comparison in comparisons:
        row: dict[str, Any] = asdict(comparison.published) | {
            "reason": comparison.reason,
            "ours": comparison.value,
            "difference": comparison.difference,
            "low": comparison.low,
            "high": comparison.high,
            "verdict": comparison.verdict,
            "our_setting": comparison.our_setting,
            "seeds": comparison.seeds or None,
            "settings": comparison.settings or None,
            "run_ids": " ".join(comparison.run_ids),
        }
        writer.writerow(row)
    return file.getvalue()
