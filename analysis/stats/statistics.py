"""Tests and intervals of differences: pure functions of arrays and frames, computed by scipy and statsmodels.

Cells of a sweep are no independent draws: they answer the same examples and grow from the same base models. What that
does to a test, and which test therefore stands behind which claim, is in docs/statistics.md; tests/test_simulation.py
measures it on simulated sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.stats.paired import LEVEL, Z, difference_interval, mcnemar_p

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference with its interval at `LEVEL`, and the p of its being 0."""

    value: float
    low: float
    high: float
    p: float
    test: str

    @property
    def is_shown(self) -> bool:
        return self.p < 1 - LEVEL


def wilson(correct: float, count: int) -> tuple[float, float]:
    """Interval of an accuracy (Wilson 1927): inside [0, 1], and not empty at 0 or 1."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(correct, count, alpha=1 - LEVEL, method="wilson")
    return float(low), float(high)


def paired_difference(
    before: Sequence[bool] | NDArray[np.bool_], after: Sequence[bool] | NDArray[np.bool_]
) -> Estimate:
    """Accuracy of `after` minus that of `before` on the same examples: do these two models differ?

    p: McNemar's exact test of the examples that only one of them answers. Interval: Bonett & Price (2012).
    """
    a, b = np.asarray(before, bool), np.asarray(after, bool)
    won, lost, count = int((b & ~a).sum()), int((a & ~b).sum()), len(a)
    interval = difference_interval(won, lost, count)
    return Estimate((won - lost) / count, *interval, mcnemar_p(won, lost), "McNemar, exact")


def paired_bootstrap(differences: Sequence[float] | Floats, resamples: int = 2000) -> Estimate:
    """The mean of paired differences, for scores that are no yes or no: one value an example."""
    values = np.asarray(differences, float)
    if not np.ptp(values):
        value = float(values[0])
        return Estimate(value, value, value, 1.0 if value == 0 else 0.0, "paired bootstrap")
    drawn = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, confidence_level=LEVEL, method="percentile", batch=100, rng=0
    )
    at_or_below = np.mean(drawn.bootstrap_distribution <= 0), np.mean(drawn.bootstrap_distribution >= 0)
    p = min(1.0, max(2 * float(min(at_or_below)), 1 / resamples))
    low, high = drawn.confidence_interval
    return Estimate(float(values.mean()), float(low), float(high), p, "paired bootstrap")


def clustered_mean(
    values: Floats, weights: Floats, units: Iterable[object], examples: Iterable[object], named: str
) -> Estimate:
    """The weighted mean of `values`, where those of the same unit hang together and those of the same example too.

    units: what the claim is to hold for besides these: base models, or cells of one base. The variance is that of
    two-way clusters (Cameron, Gelbach & Miller 2011, eq. 2.8), to which the common examples may only add; t has one
    degree of freedom less than there are units. Of a single unit nothing is shown.
    """
    import statsmodels.api as sm
    from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

    by_unit, by_example = (pd.factorize(pd.Series(list(names)))[0] for names in (units, examples))
    df, mean = int(by_unit.max()), float(np.average(values, weights=weights))
    test = f"two-way clustered by {named} and example, t with {df} df"
    if df < 1:
        return Estimate(mean, -math.inf, math.inf, 1.0, test)
    fit = sm.WLS(values, np.ones(len(values)), weights=weights).fit()
    both, alone, _ = (float(np.squeeze(v)) for v in cov_cluster_2groups(fit, by_unit, by_example))
    stderr = math.sqrt(max(both, alone, 0.0))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, df)) * stderr
    p = 2 * float(stats.t.sf(abs(mean) / stderr, df)) if stderr > 1e-12 else float(abs(mean) < 1e-12)
    return Estimate(mean, mean - half, mean + half, p, test)


def naive_paired_t(differences: Sequence[float]) -> Estimate:
    """The plain paired t over cells, which takes them for independent: shown for comparison, never behind a claim."""
    values = np.asarray(differences, float)
    found = stats.ttest_1samp(values, 0.0) if np.ptp(values) else None
    p = float(found.pvalue) if found else float(values[0] == 0)
    low, high = found.confidence_interval(LEVEL) if found else (values[0], values[0])
    return Estimate(float(values.mean()), float(low), float(high), p, "paired t over cells, taken for independent")


def against_published(accuracy: float, count: int, published: float, published_count: int | None = None) -> Estimate:
    """An accuracy minus a published one, by their binomial standard errors; the published one is taken as exact
    where its number of examples is unknown."""
    variance = accuracy * (1 - accuracy) / count
    if published_count:
        variance += published * (1 - published) / published_count
    else:
        variance += published * (1 - published) / count  # the null: both have the published accuracy
        variance /= 2
    stderr, value = math.sqrt(variance), accuracy - published
    p = 2 * float(stats.norm.sf(abs(value) / stderr)) if stderr else float(value == 0)
    return Estimate(value, value - Z * stderr, value + Z * stderr, p, "z, binomial standard error")


def holm(p_values: Sequence[float]) -> list[float]:
    """p corrected for how many are tested at once (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def anova(table: pd.DataFrame, value: str, factors: Sequence[str]) -> pd.DataFrame:
    """How much of the variance of `value` each factor explains: type II sums of squares of the main effects.

    One row a factor and one of the residual: sum_sq, df, F, p, eta_squared (of the total), omega_squared (the same
    without its bias; Hays 1963). The p takes rows for independent: for cells, use `repeated_measures`.
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


def repeated_measures(table: pd.DataFrame, value: str, subject: str, factor: str) -> tuple[float, float, float, float]:
    """(F, numerator df, denominator df, p) of `factor` against how its effect varies between subjects.

    table: one or more rows of each subject and level, averaged. Subjects are what is independent: base models.
    """
    from statsmodels.stats.anova import AnovaRM

    found = AnovaRM(table, value, subject, within=[factor], aggregate_func="mean").fit().anova_table
    f, df, df_error, p = (float(found.iloc[0][name]) for name in ("F Value", "Num DF", "Den DF", "Pr > F"))
    return f, df, df_error, p


def smallest_shown(count: int, disagreement: float = 0.1) -> float:
    """The smallest difference of two accuracies that `count` examples show with a power of 0.8, where the models
    answer a share `disagreement` of the examples otherwise (McNemar's normal approximation, Connor 1987)."""
    return (Z + float(stats.norm.ppf(0.8))) * math.sqrt(disagreement / count)


def seeds_sentence(seeds: int) -> str:
    """Say what this number of seeds can and cannot show."""
    if seeds == 1:
        return (
            "With one seed, a difference between two single runs may be the luck of their trainings: tests of one "
            "pair say that these two models differ, not that their settings do. Differences over many cells count "
            "each training's luck as noise and do speak of settings; nothing is known of other seeds' spread."
        )
    return (
        f"With {seeds} seeds, the spread between trainings of the same setting is measured, by {seeds - 1} degrees of "
        f"freedom a setting; a difference between two settings below about "
        f"{float(stats.t.ppf(0.5 + LEVEL / 2, 2 * (seeds - 1))) * math.sqrt(2 / seeds):.1f} of its standard "
        "deviations cannot be told from luck."
    )
