"""What people read: the figures, the comparison with published numbers, and the HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.baselines.comparison import Comparison, compare, protocols
from analysis.baselines.phoenix import phoenix_table
from analysis.baselines.published import COLUMNS, load_published
from analysis.figures import FIGURES
from analysis.hardware import hardware_pairs, hardware_rows
from analysis.page import Audited, Content, Said, page_of
from analysis.runs import runs_of
from analysis.style import save
from tune_sparse.paths import write_text

PAGE = "report.html"
COMPARED = ("reason", "ours", "difference", "half_interval", "described", "run_ids")


def present(
    folder: Path,
    results_dirs: Sequence[Path],
    cells: pd.DataFrame,
    counts: str,
    passing: pd.DataFrame,
    pass_mark: float,
    audited: Audited,
    findings: Sequence[Said] = (),
    published_files: Sequence[Path] = (),
) -> Path:
    """Draw every figure that has something to show, write the comparisons, and the page; returns the page's path.

    Raises `InputError` for a file of published numbers that breaks a rule, before anything is written.
    """
    published = load_published(published_files, set(cells["model"]))
    comparisons = compare(published, cells, protocols(results_dirs))
    write_text(folder / "published_comparison.csv", _as_csv(comparisons))
    write_text(folder / "phoenix_comparison.tex", phoenix_table(comparisons))
    pairs = hardware_pairs(cells)
    if not pairs.empty:
        write_text(folder / "hardware_comparison.csv", pairs.to_csv(index=False))
    page = folder / PAGE
    content = Content(
        counts=counts,
        cells=cells,
        folders=results_dirs,
        audited=audited,
        findings=findings,
        passing=passing,
        pass_mark=pass_mark,
        comparisons=comparisons,
        hardware=hardware_rows(pairs),
        figures=draw_figures(folder, results_dirs, cells),
    )
    write_text(page, page_of(content, page))
    return page


def draw_figures(folder: Path, results_dirs: Sequence[Path], cells: pd.DataFrame) -> dict[str, str]:
    """{name: caption} of the figures that were drawn; one of an earlier report that has nothing to show now goes."""
    drawn, runs = {}, runs_of(results_dirs)
    for name, shown in FIGURES.items():
        path = folder / f"{name}.png"
        figure = shown.draw(cells, runs)
        if figure is not None:
            save(figure, path)
            drawn[name] = shown.caption
        else:
            path.unlink(missing_ok=True)
            path.with_suffix(".pdf").unlink(missing_ok=True)
    return drawn


def _as_csv(comparisons: Sequence[Comparison]) -> str:
    """Every published number with what stands beside it, or why nothing does."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*COLUMNS, *COMPARED], lineterminator="\n")
    writer.writeheader()
    for comparison in comparisons:
        row: dict[str, Any] = asdict(comparison.published) | {
            "reason": comparison.reason,
            "ours": comparison.value,
            "difference": comparison.difference,
            "half_interval": comparison.half_interval,
            "described": comparison.described,
            "run_ids": " ".join(comparison.run_ids),
        }
        writer.writerow(row)
    return file.getvalue()
