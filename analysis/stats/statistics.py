"""Tests and intervals of differences: pure functions of arrays and frames, computed by scipy and statsmodels.

Means over many cells, which share examples, models and seeds, are in `crossed` and `scopes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.stats.paired import LEVEL, Z, difference_interval, mcnemar_p


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference with its interval, and the p of its being 0; nan where no verdict is given."""

    value: float
    low: float
    high: float
    p: float
    test: str


def wilson(correct: float, count: int) -> tuple[float, float]:
    """Interval of an accuracy (Wilson 1927): inside [0, 1], and not empty at 0 or 1."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(correct, count, alpha=1 - LEVEL, method="wilson")
    return float(low), float(high)


def paired_difference(
    before: Sequence[bool] | NDArray[np.bool_], after: Sequence[bool] | NDArray[np.bool_], level: float = LEVEL
) -> Estimate:
    """Accuracy of `after` minus that of `before` on the same examples: do these two models differ?

    p: McNemar's exact test of the examples that only one of them answers. Interval: Bonett & Price (2012).
    """
    a, b = np.asarray(before, bool), np.asarray(after, bool)
    won, lost, count = int((b & ~a).sum()), int((a & ~b).sum()), len(a)
    interval = difference_interval(won, lost, count, level)
    return Estimate((won - lost) / count, *interval, mcnemar_p(won, lost), "McNemar, exact")


def holm(p_values: Sequence[float]) -> list[float]:
    """p corrected for how many are tested at once (Holm 1979); one that is nan is no test, and stays so."""
    from statsmodels.stats.multitest import multipletests

    corrected, known = np.array(p_values, float), ~np.isnan(np.array(p_values, float))
    if known.sum() > 1:
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return [float(p) for p in corrected]


def anova(table: pd.DataFrame, value: str, factors: Sequence[str]) -> pd.DataFrame:
    """How much of the variance of `value` each factor explains: type II sums of squares of the main effects.

    One row a factor and one of the residual: sum_sq, df, F, p, eta_squared (of the total), omega_squared (the same
    without its bias; Hays 1963). The p takes rows for independent, which cells are not: it is behind no claim.
    """
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    formula = f"Q('{value}') ~ " + " + ".join(f"C(Q('{name}'))" for name in factors)
    found = anova_lm(ols(formula, table).fit(), typ=2).rename(columns={"PR(>F)": "p"})
    found.index = pd.Index([*factors, "residual"], name="factor")
    error = found.loc["residual", "sum_sq"] / found.loc["residual", "df"]
    total = found["sum_sq"].sum()
    found["eta_squared"] = found["sum_sq"] / total
    found["omega_squared"] = (found["sum_sq"] - found["df"] * error) / (total + error)
    found.loc["residual", ["omega_squared"]] = np.nan
    return found.reset_index()


def smallest_shown(count: int, disagreement: float = 0.1) -> float:
    """The smallest difference of two accuracies that `count` examples show with a power of 0.8, where the models
    answer a share `disagreement` of the examples otherwise (McNemar's normal approximation, Connor 1987)."""
    return (Z + float(stats.norm.ppf(0.8))) * math.sqrt(disagreement / count)


def seeds_sentence(seeds: int) -> str:
    """Say what this number of seeds can and cannot show."""
    if seeds < 3:
        named = "one seed" if seeds == 1 else f"{seeds} seeds"
        return (
            f"With {named}, differences are described for these trainings: their intervals are over test examples, and "
            "say nothing of other trainings. A verdict for these models and tasks takes at least three seeds "
            "(`--seeds 0 1 2`), one for models or for tasks in general at least five of them."
        )
    return (
        f"With {seeds} seeds, the spread between trainings of the same setting is measured, by {seeds - 1} degrees of "
        f"freedom a model and task; a difference between two settings below about "
        f"{float(stats.t.ppf(0.5 + LEVEL / 2, 2 * (seeds - 1))) * math.sqrt(2 / seeds):.1f} of its standard "
        "deviations cannot be told from luck."
    )
