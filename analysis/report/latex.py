"""The main table of a paper: accuracy over sparsity by model, task, method and mode, in LaTeX (booktabs)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

MISSING = "--"
NOTE = (
    "Accuracy in percent, half of its 95\\% interval (Wilson) in parentheses. "
    "{dash}: no finished run. \\textdagger: the audit has a notice of the run; \\textdaggerdbl: a fault."
)
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
LIGHT_NOTICES = {"few-examples", "unchecked", "uncommitted", "modes-coincide", "same-answers", "hardware", "few-steps"}
"""Notices that speak of a whole sweep or of pairs; in a table they would mark everything. They are in summary.csv."""


def main_results(cells: pd.DataFrame) -> str:
    """One `table` a model. Needs \\usepackage{booktabs}.

    cells: as in summary.csv, with accuracy_low, accuracy_high and notices. Seeds are averaged, their intervals too.
    """
    tables = [_table(str(model), rows) for model, rows in cells.groupby("model", sort=True)]
    return "% \\usepackage{booktabs}\n" + "\n".join(tables)


def _table(model: str, cells: pd.DataFrame) -> str:
    sparsities = sorted(cells["sparsity"].unique())
    lines = [
        r"\begin{table}",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape(model)}. {NOTE.format(dash=MISSING)}}}",
        rf"\begin{{tabular}}{{lll{'r' * len(sparsities)}}}",
        r"\toprule",
        "task & method & mode & " + " & ".join(f"{s:g}" for s in sparsities) + r" \\",
    ]
    for _, of_task in cells.groupby("task", sort=False):
        lines.append(r"\midrule")
        for (task, method, mode, backend), curve in of_task.groupby(["task", "method", "mode", "backend"], sort=True):
            by_sparsity = {s: _entry(same) for s, same in curve.groupby("sparsity")}
            named = [str(task), str(method), str(mode)]
            named[2] += "" if backend == "torch" else f" ({backend})"
            lines.append(" & ".join([*map(escape, named), *_row(by_sparsity, sparsities)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _row(entries: Mapping[Any, str], sparsities: list[float]) -> list[str]:
    return [entries.get(sparsity, MISSING) for sparsity in sparsities]


def _entry(seeds: pd.DataFrame) -> str:
    known = seeds[seeds["accuracy"].notna()]
    if known.empty:
        return MISSING
    half = (known["accuracy_high"] - known["accuracy_low"]).mean() / 2
    around = "" if math.isnan(half) else f"\\,({100 * half:.1f})"
    return f"{100 * known['accuracy'].mean():.1f}{around}{_mark(' '.join(known['notices']))}"


def _mark(notices: str) -> str:
    rules = set(notices.split())
    if any(rule.isupper() for rule in rules):
        return r"\textdaggerdbl"
    return r"\textdagger" if rules - LIGHT_NOTICES else ""


def escape(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(SPECIAL.get(character, character) for character in text)
