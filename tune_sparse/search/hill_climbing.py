"""Hill climbing over the ranks of a space, as a searcher of Ray Tune."""

from __future__ import annotations

import random
from typing import Any

from ray.tune.search import Searcher

from tune_sparse.lora.rank_space import Ranks, Space
from tune_sparse.search.journal import configuration_key
from tune_sparse.search.racing import pareto_front
from tune_sparse.sweep.tune_parts import Unsaved


class HillClimbing(Unsaved, Searcher):
    """Pareto local search (Paquete, Chiarandini & Stützle 2004) from the heuristic: a random neighbour of a random
    member of the front, one rank up or down in one dimension, that was not suggested before."""

    def __init__(self, space: Space, layers: int, seed: int, minimises_cost: bool) -> None:
        super().__init__(metric="accuracy", mode="max")
        self._choices, self._rng = space.dimensions(layers), random.Random(seed)
        self._first = [space.maximal(layers), space.heuristic(layers)]
        self._minimises_cost = minimises_cost
        self._open: dict[str, Ranks] = {}
        self._scored: dict[str, tuple[float, float, Ranks]] = {}
        self._suggested: set[str] = set()

    def suggest(self, trial_id: str) -> Ranks:
        ranks = self._first.pop() if self._first else self._next()
        self._suggested.add(configuration_key(ranks))
        self._open[trial_id] = ranks
        return ranks

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        ranks = self._open.pop(trial_id)
        if result and not error:
            cost = result["cost"] if self._minimises_cost else 0.0
            self._scored[configuration_key(ranks)] = (result["accuracy"], cost, ranks)

    def _next(self) -> Ranks:
        members = self._front()
        self._rng.shuffle(members)
        for member in members:
            neighbours = [n for n in self._neighbours(member) if configuration_key(n) not in self._suggested]
            if neighbours:
                return self._rng.choice(neighbours)
        return {name: self._rng.choice(ranks) for name, ranks in self._choices.items()}

    def _front(self) -> list[Ranks]:
        points = {key: (accuracy, cost) for key, (accuracy, cost, _) in self._scored.items()}
        return [self._scored[key][2] for key in pareto_front(points, keep_equal=not self._minimises_cost)]

    def _neighbours(self, ranks: Ranks) -> list[Ranks]:
        return [
            ranks | {name: choices[at]}
            for name, choices in self._choices.items()
            for at in (choices.index(ranks[name]) - 1, choices.index(ranks[name]) + 1)
            if 0 <= at < len(choices)
        ]
