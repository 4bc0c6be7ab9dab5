"""A sampler with a memory: what it suggests is written down, so that a killed search goes on where it was.

A killed search is continued by asking a fresh sampler all that it was asked, and telling it all that it was told, in
the same order: it is then in the state that it was killed in, its random numbers included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.search import Searcher

from tune_sparse.errors import RunError
from tune_sparse.lora.rank_space import Ranks
from tune_sparse.search.journal import Candidates, SearchJournal, Suggestion, configuration_key
from tune_sparse.search.racing import WARM_UP, Correctness, Race, cut_stages, most_divisive_first
from tune_sparse.sweep.tune_parts import Unsaved

Suggest = Callable[[Ranks, list[list[int]]], dict[str, Any]]
SUGGESTIONS_PER_CANDIDATE = 10
"""A small space is exhausted, or a sampler converges: it may repeat itself so often."""


class JournaledSearcher(Unsaved, Searcher):
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
            if suggestion is None:  # one that runs may be lost, and suggested again
                return None if self._running else Searcher.FINISHED
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
        scored, suggested = (
            len({configuration_key(s.ranks) for s in self._journal.suggestions}),
            len(self._journal.suggestions),
        )
        if scored >= self._budget or suggested >= SUGGESTIONS_PER_CANDIDATE * self._budget:
            return None
        return self._journal.ask(self._sampler.suggest(str(suggested)))

    def _from_ledger(self, ranks: Ranks) -> dict[str, Any] | None:
        """Read the result of a configuration that another search, or one that was killed, scored in full."""
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

    def requeue(self, ranks: Ranks) -> None:
        """Suggest a configuration once more, whose worker was lost."""
        key = configuration_key(ranks)
        self._open.extend(s for s in self._journal.open() if configuration_key(s.ranks) == key and s not in self._open)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler has seen it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        suggestion = self._running.pop(trial_id, None)
        if suggestion is None or error or not result:
            return  # stopped from outside, or its worker was lost: `requeue`, or the next start, takes it up
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
        completed = self._journal.tell(suggestion.number, **known, examples=examples)
        self._results[configuration_key(suggestion.ranks)] = dict(known)
        self._tell_sampler(completed)
