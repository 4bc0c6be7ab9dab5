"""Which sampler suggests candidates: one of Optuna's under Ray Tune's interface, or hill climbing."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tune_sparse.lora.rank_space import Space
from tune_sparse.search.hill_climbing import HillClimbing

POPULATION = 20
"""NSGA-II's, for five generations in a hundred candidates."""

OPTUNA_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "nsga2": lambda seed: NSGAIISampler(population_size=POPULATION, seed=seed),
    "tpe": lambda seed: TPESampler(multivariate=True, seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}


def searcher_named(name: str, space: Space, layers: int, seed: int, objectives: tuple[str, ...]) -> Searcher:
    """A sampler that first suggests the heuristic and the maximal configuration."""
    metrics = ["accuracy", "cost"][: len(objectives)]
    if name == "hill-climbing":
        return HillClimbing(space, layers, seed, len(objectives) > 1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate
        sampler = OPTUNA_SAMPLERS[name](seed)
    dimensions = space.dimensions(layers).items()
    first = [space.heuristic(layers), space.maximal(layers)]
    return OptunaSearch(
        space={dimension: CategoricalDistribution(ranks) for dimension, ranks in dimensions},
        metric=metrics if len(metrics) > 1 else metrics[0],
        mode=["max", "min"] if len(metrics) > 1 else "max",
        points_to_evaluate=first[: 1 + (first[0] != first[1])],
        sampler=sampler,
    )
