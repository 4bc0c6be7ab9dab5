"""Phoenix's accuracies beside ours, as a LaTeX table (booktabs); what nobody has entered is "not available"."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.baselines.comparison import NOT_AVAILABLE, PublishedComparison
from analysis.report.rounding import rounded, with_interval

SOURCE = "Phoenix"
NOT_COMPARABLE = "not comparable"
COLUMNS = ("model", "task", "sparsity", "Phoenix", "our setting", "ours", "ours $-$ Phoenix")
HEAD = "% Made by `tune-sparse report` from published numbers and finished runs.\n"


def phoenix_table(comparisons: Sequence[PublishedComparison]) -> str:
    """A line for each accuracy of the paper and setting of ours; why nothing is compared stands in the last column."""
    chosen = [c for c in comparisons if c.published.source == SOURCE]
    table = pd.DataFrame([_fields(c) for c in chosen], columns=list(COLUMNS))
    style = table.style.hide(axis="index").format(escape="latex")
    return HEAD + style.to_latex(hrules=True, column_format="l" * len(COLUMNS))


def _fields(comparison: PublishedComparison) -> tuple[str, ...]:
    published = comparison.published
    sparsity = "--" if published.sparsity is None else f"{published.sparsity:g}"
    theirs = NOT_AVAILABLE if published.value is None else f"{published.value:.6g}"
    setting = (published.model, published.task, sparsity, theirs)
    if published.value is None:
        return (*setting, "--", "--", NOT_AVAILABLE)
    if comparison.reason:
        return (*setting, "--", "--", f"{NOT_COMPARABLE}: {comparison.reason}")
    difference = with_interval(comparison.difference, comparison.low, comparison.high)
    return (*setting, comparison.described, rounded(comparison.value), difference)
