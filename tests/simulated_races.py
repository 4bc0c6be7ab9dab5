"""Races among candidates whose true accuracies are known: how often the rule stops one that is as good, or better."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tune_sparse.search.racing import WARM_UP, Correctness, Race, cut_stages, most_divisive_first

EXAMPLES, HARD = 400, 0.3
"""Selection examples, and the fraction that not every candidate answers rightly: the others divide nobody."""


@dataclass(frozen=True)
class Stopped:
    """The fraction of equal candidates that were stopped, and whether the better one was."""

    equal_fraction: float
    better: bool


def race_of_equals(minimises_cost: bool, seed: int, candidates: int = 60, better_by: float = 0.02) -> Stopped:
    """One race in random order among equally good candidates, and one that is `better_by` more accurate; costs are
    random. Those of the warm-up, who cannot be stopped, are not counted, and the better one comes after it."""
    rng = random.Random(seed)
    race, better = Race(EXAMPLES, minimises_cost), rng.randrange(WARM_UP, candidates)
    stages, stopped = [list(range(EXAMPLES))], set()
    for number in range(candidates):
        if number == WARM_UP:
            stages = cut_stages(most_divisive_first(list(race.correctness.values()), EXAMPLES, seed))
        chance = 0.5 + (better_by / HARD if number == better else 0.0)
        right = [i >= HARD * EXAMPLES or rng.random() < chance for i in range(EXAMPLES)]
        mine, cost = Correctness(EXAMPLES), rng.random()
        for stage in stages:
            mine = mine.adding((i, right[i]) for i in stage)
            race.update(str(number), cost, mine)
            if not mine.is_complete and race.beaten_by(str(number)) is not None:
                stopped.add(number)
                break
    return Stopped(len(stopped - {better}) / (candidates - WARM_UP - 1), better in stopped)
