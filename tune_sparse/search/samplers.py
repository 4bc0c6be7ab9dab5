"""Samplers under Ray Tune's interface: Optuna's and hill climbing, written down as they go, so that they can go on.

A killed search is continued by asking a fresh sampler all that it was asked, and telling it all that it was told, in
the same order: it is then in the state that it was killed in, its random numbers included.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tune_sparse.errors import RunError
from tune_sparse.lora.rank_space import Ranks, Space
from tune_sparse.search.journal import Candidates, SearchJournal, Suggestion, configuration_key
from tune_sparse.search.racing import WARM_UP, Correctness, Race, cut_stages, most_divisive_first
from tune_sparse.sweep.callbacks import Stop

Suggest = Callable[[Ranks, list[list[int]]], dict[str, Any]]
SUGGESTIONS_PER_CANDIDATE = 10
"""A small space is exhausted, or a sampler converges: it may repeat itself so often."""
POPULATION = 20
"""Of NSGA-II: five generations in a hundred candidates."""

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


class HillClimbing(Searcher):
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
        front: list[Ranks] = []
        best = -1.0
        for accuracy, _, ranks in sorted(self._scored.values(), key=lambda s: (s[1], -s[0], configuration_key(s[2]))):
            if accuracy > best or (not self._minimises_cost and accuracy == best):
                front.append(ranks)
                best = accuracy
        return front

    def _neighbours(self, ranks: Ranks) -> list[Ranks]:
        return [
            ranks | {name: choices[at]}
            for name, choices in self._choices.items()
            for at in (choices.index(ranks[name]) - 1, choices.index(ranks[name]) + 1)
            if 0 <= at < len(choices)
        ]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal of the search is what is kept."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


class JournaledSearcher(Searcher):
    """A sampler with a memory: it suggests to Ray what is not known yet, until `budget` candidates have been scored.

    `as_trial` makes a trial's config of ranks and the stages of its examples; `cost` is what is minimised. What the
    ledger knows of `candidates` is told without a trial.
    """

    def __init__(
        self,
        sampler: Searcher,
        journal: SearchJournal,
        candidates: Candidates,
        race: Race,
        cost: Callable[[Ranks], float],
        as_trial: Suggest,
        budget: int,
        seed: int,
        is_racing: bool = True,
    ) -> None:
        super().__init__()
        self._sampler, self._journal, self._candidates, self._race = sampler, journal, candidates, race
        self._cost, self._as_trial, self._budget, self._seed = cost, as_trial, budget, seed
        self._is_racing = is_racing
        self._running: dict[str, Suggestion] = {}
        self._results: dict[str, dict[str, Any]] = {}
        """{key: what the sampler was told of a configuration}"""
        self._stages = journal.stages()
        self._replay()
        self._open = deque(journal.open())

    def __deepcopy__(self, memo: dict[int, Any]) -> JournaledSearcher:
        """Itself: Ray copies searcher and scheduler apart, and these two talk."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray saves its searchers to restore an experiment, and ours goes on from its journal."""
        return {}

    def _replay(self) -> None:
        for is_asking, suggestion in self._journal.events():
            if is_asking:
                ranks = self._sampler.suggest(str(suggestion.number))
                if ranks != suggestion.ranks:
                    raise RunError(
                        f"a sampler must suggest again what it suggested, {suggestion.ranks} in suggestion "
                        f"{suggestion.number}, got {ranks}. Continue with the version of Optuna that began."
                    )
            else:
                self._remember(suggestion)
                self._tell_sampler(suggestion)

    def _remember(self, suggestion: Suggestion) -> None:
        key = configuration_key(suggestion.ranks)
        self._results[key] = {"state": suggestion.state, "accuracy": suggestion.accuracy, "cost": suggestion.cost}
        known = self._candidates.read(suggestion.ranks)
        if suggestion.state != "failed" and known is not None:
            self._race.update(key, self._cost(suggestion.ranks), Correctness.from_text(known.correctness))

    def _tell_sampler(self, suggestion: Suggestion) -> None:
        values = None
        if suggestion.state != "failed":
            values = {"accuracy": suggestion.accuracy, "cost": suggestion.cost}
        self._sampler.on_trial_complete(str(suggestion.number), values, error=values is None)

    def suggest(self, trial_id: str) -> Any:
        """A config for Ray, None while it must wait, or that the search has ended."""
        while True:
            suggestion = self._open.popleft() if self._open else self._ask()
            if suggestion is None:
                return Searcher.FINISHED
            key = configuration_key(suggestion.ranks)
            if any(configuration_key(other.ranks) == key for other in self._running.values()):
                self._open.appendleft(suggestion)
                return None
            known = self._results.get(key) or self._from_ledger(suggestion.ranks)
            if known is None:
                self._running[trial_id] = suggestion
                return self._as_trial(suggestion.ranks, self._current_stages())
            self._tell(suggestion, known, 0)

    def _ask(self) -> Suggestion | None:
        scored, asked = (
            len({configuration_key(s.ranks) for s in self._journal.suggestions}),
            len(self._journal.suggestions),
        )
        if scored >= self._budget or asked >= SUGGESTIONS_PER_CANDIDATE * self._budget:
            return None
        return self._journal.ask(self._sampler.suggest(str(asked)))

    def _from_ledger(self, ranks: Ranks) -> dict[str, Any] | None:
        """Of a configuration that another search, or one that was killed, scored in full."""
        found = self._candidates.read(ranks)
        if found is None or not (found.error or Correctness.from_text(found.correctness).is_complete):
            return None
        return self._judged(ranks, found.correctness, found.error["message"] if found.error else None, None)

    def _current_stages(self) -> list[list[int]]:
        """Until enough candidates have answered everything, whatever comes first, all of it, and all at once."""
        if self._stages is None and self._is_racing:
            complete = [self._race.correctness[key] for key in self._race.complete()[:WARM_UP]]
            if len(complete) < WARM_UP:
                return [list(range(self._race.n))]
            self._stages = cut_stages(most_divisive_first(complete, self._race.n, self._seed))
            self._journal.write_stages(self._stages)
        return self._stages or [list(range(self._race.n))]

    def is_beaten(self, trial_id: str, correctness: str) -> bool:
        """Whether a running candidate that has answered so much can stop."""
        return self._beater(self._running[trial_id].ranks, correctness) is not None

    def _beater(self, ranks: Ranks, correctness: str) -> str | None:
        self._race.update(configuration_key(ranks), self._cost(ranks), Correctness.from_text(correctness))
        return self._race.beaten_by(configuration_key(ranks)) if self._is_racing else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler has seen it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        suggestion = self._running.pop(trial_id, None)
        if suggestion is None or error or not result:
            return  # stopped from outside, or its worker was lost: the next start of the search takes it up
        beater = None
        if result["error"] is None and not Correctness.from_text(result["correctness"]).is_complete:
            beater = self._beater(suggestion.ranks, result["correctness"])
        known = self._judged(suggestion.ranks, result["correctness"], result["error"], beater)
        if known["state"] != "open":
            self._tell(suggestion, known, Correctness.from_text(result["correctness"]).count)

    def _judged(self, ranks: Ranks, correctness: str, error: str | None, beater: str | None) -> dict[str, Any]:
        key = configuration_key(ranks)
        if error is not None:
            self._race.correctness.pop(key, None)
            return {"state": "failed", "error": error}
        found = Correctness.from_text(correctness)
        self._race.update(key, self._cost(ranks), found)
        state = "done" if found.is_complete else "stopped" if beater else "open"
        accuracy = self._race.estimate(key, beater)
        return {"state": state, "accuracy": accuracy, "cost": self._cost(ranks)}

    def _tell(self, suggestion: Suggestion, known: Mapping[str, Any], examples: int) -> None:
        told = self._journal.tell(suggestion.number, **known, examples=examples)
        self._results[configuration_key(suggestion.ranks)] = dict(known)
        self._tell_sampler(told)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what is kept."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


class RacingScheduler(FIFOScheduler):
    """Stops a candidate as soon as the search calls it beaten."""

    def __init__(self, search: JournaledSearcher) -> None:
        super().__init__()
        self._search = search

    def __deepcopy__(self, memo: dict[int, Any]) -> RacingScheduler:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["error"] is None and self._search.is_beaten(trial.trial_id, result["correctness"]):
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE


class SearchCallback(tune.Callback):
    """Says now and then how a search goes, and ends it when a worker cannot work."""

    def __init__(self, journal: SearchJournal, budget: int, stop: Stop, report: Callable[[str], None]) -> None:
        self._journal, self._budget, self._stop, self._report = journal, budget, stop, report
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as for `JournaledSearcher`."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._journal.completed >= self._next:
            stopped = sum(s.state == "stopped" for s in self._journal.suggestions)
            self._report(f"{self._journal.completed} candidates of {self._budget}, {stopped} of them stopped early")
            self._next = self._journal.completed + max(1, self._budget // 5)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = [line for line in str(trial.get_pickled_error()).splitlines() if line.strip()]
        self._stop.because(lines[-1] if lines else "a worker process ended unexpectedly")
