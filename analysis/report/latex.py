"""The main table of a paper: accuracy over sparsity by model, task, method and mode, in LaTeX (booktabs)."""

from __future__ import annotations

import math

import pandas as pd

MISSING = "--"
NOTE = (
    "Accuracy in percent, half of its 95\\% interval (Wilson) in parentheses. "
    f"{MISSING}: no finished run. \\textdagger: the audit has a warning about the run; \\textdaggerdbl: an error."
)
NAMES = ["task", "method", "mode"]
LIGHT_WARNINGS = {
    *("few-examples", "unchecked", "uncommitted", "modes-coincide", "same-answers"),
    *("hardware", "budgets", "few-steps", "pruning-gone"),
}
"""Warnings that speak of a whole sweep or of pairs; in a table they would mark everything. They are in summary.csv."""


def main_results(cells: pd.DataFrame) -> str:
    """One `table` a model. Needs \\usepackage{booktabs}.

    cells: as in summary.csv, with accuracy_low, accuracy_high and warnings. Seeds are averaged, their intervals too.
    """
    tables = [_latex_table(str(model), _entries(rows)) for model, rows in cells.groupby("model", sort=True)]
    return "% \\usepackage{booktabs}\n" + "\n".join(tables)


def _entries(cells: pd.DataFrame) -> pd.DataFrame:
    """A line each task, method, mode and backend: `NAMES`, and an entry for each sparsity."""
    sparsities = sorted(cells["sparsity"].unique())
    lines = []
    for _, of_task in cells.groupby("task", sort=False):
        for (task, method, mode, backend), curve in of_task.groupby([*NAMES, "backend"], sort=True):
            by_sparsity = {s: _entry(same) for s, same in curve.groupby("sparsity")}
            where = "" if backend == "torch" else f" ({backend})"
            lines.append([task, method, f"{mode}{where}", *(by_sparsity.get(s, MISSING) for s in sparsities)])
    return pd.DataFrame(lines, columns=[*NAMES, *(f"{s:g}" for s in sparsities)])


def _latex_table(model: str, entries: pd.DataFrame) -> str:
    style = entries.style.hide(axis="index").format(escape="latex", subset=pd.IndexSlice[:, NAMES])
    next_tasks = entries.index[~entries["task"].duplicated()][1:]
    style = style.format("\\midrule\n{}", escape="latex", subset=(next_tasks, "task"))
    style = style.set_table_styles(
        [{"selector": "scriptsize", "props": ":;"}, {"selector": "setlength", "props": r":{\tabcolsep}{3pt};"}]
    )
    columns = "l" * len(NAMES) + "r" * (len(entries.columns) - len(NAMES))
    caption = f"{escape(model)}. {NOTE}"
    return style.to_latex(hrules=True, column_format=columns, caption=caption, position_float="centering")


def _entry(seeds: pd.DataFrame) -> str:
    known = seeds[seeds["accuracy"].notna()]
    if known.empty:
        return MISSING
    half = (known["accuracy_high"] - known["accuracy_low"]).mean() / 2
    around = "" if math.isnan(half) else f"\\,({100 * half:.1f})"
    return f"{100 * known['accuracy'].mean():.1f}{around}{_mark(' '.join(known['warnings']))}"


def _mark(warnings: str) -> str:
    rules = set(warnings.split())
    if any(rule.isupper() for rule in rules):
        return r"\textdaggerdbl"
    return r"\textdagger" if rules - LIGHT_WARNINGS else ""


def escape(text: str) -> str:
    """Text as LaTeX shows it, as pandas escapes a cell; a caption is not escaped by it."""
    cell = pd.DataFrame([text]).style.hide(axis="index").hide(axis="columns").format(escape="latex")
    return cell.to_latex().splitlines()[1].removesuffix(r" \\")
