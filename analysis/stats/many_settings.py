"""Many settings against one number: intervals that hold for all of them at once, so that none wins by luck. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import variance

from scipy.special import ndtri, stdtrit

from analysis.stats.paired import LEVEL


@dataclass(frozen=True)
class Spread:
    """The variance of the accuracy between the seeds of a setting, and its degrees of freedom: 0 where each has one."""

    variance: float
    df: int


def pooled_spread(settings: Iterable[Sequence[float]]) -> Spread:
    """The spread within settings, each given by the accuracy of its seeds. It is taken to be alike in all: of the
    few seeds of each, the narrowest of many would be narrow by chance."""
    several = [by_seed for by_seed in settings if len(by_seed) > 1]
    df = sum(len(by_seed) - 1 for by_seed in several)
    return Spread(sum(variance(by_seed) * (len(by_seed) - 1) for by_seed in several) / df if df else 0.0, df)


def interval_among(
    ours: float, theirs: float, count: int, seeds: int, spread: Spread, settings: int
) -> tuple[float, float]:
    """The interval of our accuracy, a mean over `seeds`, minus a published one, simultaneous for `settings` of ours
    (Bonferroni). Both are on the same `count` examples; their errors are taken for independent, which widens it.

    The spread between seeds is in our mean, and once more in theirs, which is taken for one training that is as lucky
    as ours are. The degrees of freedom are Satterthwaite's (1946).
    """
    drawn = sum(p * (1 - p) / count for p in ((count * q + 1) / (count + 2) for q in (ours, theirs)))
    luck = spread.variance * (1 + 1 / seeds)
    tail = 1 - (1 - LEVEL) / 2 / settings
    quantile = stdtrit((drawn + luck) ** 2 / luck**2 * spread.df, tail) if luck else ndtri(tail)
    half = float(quantile) * math.sqrt(drawn + luck)
    return ours - theirs - half, ours - theirs + half
