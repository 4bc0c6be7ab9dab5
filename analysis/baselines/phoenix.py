"""Phoenix's accuracies beside ours, as a LaTeX table (booktabs); what nobody has entered is "not available"."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.baselines.comparison import NOT_AVAILABLE, Comparison
from analysis.rounding import rounded

SOURCE = "Phoenix"
NOT_COMPARABLE = "not comparable"
SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}
HEAD = r"""% Made by `tune-sparse report` from published numbers and finished runs.
\begin{tabular}{llllll}
\toprule
model & task & sparsity & Phoenix & ours & ours $-$ Phoenix \\
\midrule
"""
FOOT = "\\bottomrule\n\\end{tabular}\n"


def phoenix_table(comparisons: Sequence[Comparison]) -> str:
    """A line for each accuracy of the paper; why nothing is compared stands in the last column."""
    chosen = [c for c in comparisons if c.published.source == SOURCE]
    return HEAD + "".join(f"{' & '.join(map(escaped, _fields(c)))} \\\\\n" for c in chosen) + FOOT


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(SPECIAL.get(character, character) for character in text)


def _fields(comparison: Comparison) -> tuple[str, ...]:
    published = comparison.published
    sparsity = "--" if published.sparsity is None else f"{published.sparsity:g}"
    theirs = NOT_AVAILABLE if published.value is None else f"{published.value:.6g}"
    setting = (published.model, published.task, sparsity, theirs)
    if published.value is None:
        return (*setting, "--", NOT_AVAILABLE)
    if comparison.reason:
        return (*setting, "--", f"{NOT_COMPARABLE}: {comparison.reason}")
    half = comparison.half_interval
    stderr = half / 2 if half else None
    interval = f" +/- {rounded(half, stderr)}" if half else ""
    return (*setting, rounded(comparison.value, stderr), rounded(comparison.difference, stderr) + interval)
