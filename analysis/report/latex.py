"""The main table of a paper: accuracy over sparsity by model, task, metric, method and mode, in LaTeX (booktabs)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from analysis.read.chosen import rates_words
from analysis.read.seeds import (
    CURVE,
    calibration_words,
    over_seeds,
    primary_words,
    shown_columns,
    shown_metrics,
    spread,
    spread_words,
)

MISSING = "--"
NOTE = f"{MISSING}: no finished run. \\textdagger: the audit has a warning about the run; \\textdaggerdbl: an error."
LIGHT_WARNINGS = {
    *("few-examples", "unchecked", "uncommitted", "modes-coincide", "same-answers"),
    *("hardware", "budgets", "few-steps", "pruning-gone"),
}
"""Warnings that speak of a whole sweep or of pairs; in a table they would mark everything. They are in summary.csv."""


def main_results(cells: pd.DataFrame) -> str:
    """One `table` a model. Needs \\usepackage{booktabs}. cells: as in summary.csv, with warnings."""
    rates, by_model = rates_words(cells), over_seeds(cells).groupby("model", sort=True)
    tables = [_latex_table(str(model), rows, rates) for model, rows in by_model]
    return "% \\usepackage{booktabs}\n" + "\n".join(tables)


def _lines(table: pd.DataFrame) -> Iterator[list[str]]:
    """A line each task, metric (the primary one first), curve and backend, with an entry a sparsity."""
    sparsities, names = sorted(table["sparsity"].unique()), shown_columns(CURVE, table)
    for task, of_task in table.groupby("task", sort=False):
        for metric, column in shown_metrics(of_task).items():
            entries = _entries(of_task, column)
            for (method, mode, *schedule, backend), curve in of_task.groupby([*names, "backend"], sort=True):
                by_sparsity = dict(zip(curve["sparsity"], entries[curve.index], strict=True))
                where = "" if backend == "torch" else f" ({backend})"
                found = (by_sparsity.get(s, MISSING) for s in sparsities)
                yield [*map(str, (task, metric, method, f"{mode}{where}", *schedule)), *found]


def _entries(table: pd.DataFrame, column: str) -> pd.Series[Any]:
    """Each value with its spread and its mark; shares in percent."""
    unit = 1 if column == "perplexity" else 100
    values, around = unit * table[column], unit * spread(table, column)
    texts = [_entry(*entry) for entry in zip(values, around, table["warnings"], strict=True)]
    return pd.Series(texts, table.index)


def _entry(value: float, around: float, warnings: str) -> str:
    if math.isnan(value):
        return MISSING
    spread_text = "" if math.isnan(around) else f"\\,({around:.1f})"
    return f"{value:.1f}{spread_text}{_mark(warnings)}"


def _latex_table(model: str, table: pd.DataFrame, rates: str) -> str:
    names = ["task", "metric", *shown_columns(CURVE, table)]
    entries = pd.DataFrame(_lines(table), columns=[*names, *(f"{s:g}" for s in sorted(table["sparsity"].unique()))])
    style = entries.style.hide(axis="index").format(escape="latex", subset=pd.IndexSlice[:, names])
    next_tasks = entries.index[~entries["task"].duplicated()][1:]
    style = style.format("\\midrule\n{}", escape="latex", subset=(next_tasks, "task"))
    style = style.set_table_styles(
        [{"selector": "scriptsize", "props": ":;"}, {"selector": "setlength", "props": r":{\tabcolsep}{3pt};"}]
    )
    columns = "l" * len(names) + "r" * (len(entries.columns) - len(names))
    caption = _caption(model, table, rates)
    return style.to_latex(hrules=True, column_format=columns, caption=caption, position_float="centering")


def _caption(model: str, table: pd.DataFrame, rates: str) -> str:
    primary, calibrated = primary_words(table), calibration_words(table)
    sentences = [
        f"{model}.",
        f"Primary metrics: {primary}." if primary else "",
        f"Perplexities as they are, all else in percent; in parentheses the {spread_words(table['seeds_done'])}.",
        f"Calibrated on: {calibrated}." if calibrated else "",
        f"All {rates}.",
    ]
    return " ".join(escape(sentence) for sentence in sentences if sentence) + f" {NOTE}"


def _mark(warnings: str) -> str:
    rules = set(warnings.split())
    if any(rule.isupper() for rule in rules):
        return r"\textdaggerdbl"
    return r"\textdagger" if rules - LIGHT_WARNINGS else ""


def escape(text: str) -> str:
    """Text as LaTeX shows it, as pandas escapes a cell; a caption is not escaped by it."""
    cell = pd.DataFrame([text]).style.hide(axis="index").hide(axis="columns").format(escape="latex")
    return cell.to_latex().splitlines()[1].removesuffix(r" \\")
