"""Two models on the same examples: only those examples count that one of the two alone answers rightly. Pure."""

from __future__ import annotations

import math
from typing import Literal

from scipy import stats

LEVEL = 0.95
"""The confidence level of every interval; a claim of a difference needs a corrected p below 1 - LEVEL."""
Z = float(stats.norm.ppf(0.5 + LEVEL / 2))
"""Half of a normal interval at `LEVEL`, in standard errors."""


def mcnemar_p(won: int, lost: int, alternative: Literal["two-sided", "greater"] = "two-sided") -> float:
    """The p of McNemar's exact test: each example is won or lost alike if both models are equally good (McNemar 1947,
    Psychometrika 12, p. 153). "greater" asks whether the model that won `won` examples is the better one."""
    return float(stats.binomtest(won, won + lost, alternative=alternative).pvalue) if won + lost else 1.0


def difference_interval(won: int, lost: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of the difference of two accuracies on `count` examples (Bonett & Price 2012), which is not empty
    where no example is answered otherwise."""
    p_won, p_lost = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    half = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt((p_won + p_lost - (p_won - p_lost) ** 2) / (count + 2))
    return p_won - p_lost - half, p_won - p_lost + half
