"""Candidates on disk: what each answered, and the journal of a search, from which it goes on.

candidates/<run_id of the super-adapter>/<key>.json    one configuration: its ranks, parameters and correctness
searches/<search_id>/config.json                       what was requested
searches/<search_id>/trials/<number>.json              one suggestion of the sampler, and its result
searches/<search_id>/stages.json                       in which order examples are scored, once it is known
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tune_sparse.files import read_json, write_json
from tune_sparse.identity import hash_json
from tune_sparse.lora.rank_space import Ranks


def configuration_key(ranks: Ranks) -> str:
    """Names a configuration: equal ones have equal keys."""
    return hash_json(ranks)[:16]


@dataclass(frozen=True)
class Candidate:
    """One configuration of a super-adapter, and how it did on the selection examples."""

    ranks: Ranks
    parameters: int
    correctness: str
    """A character an example: 1 right, 0 wrong, - not answered."""
    seconds: float = 0.0
    error: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        return configuration_key(self.ranks)


class Candidates:
    """The scored configurations of one super-adapter. Workers write them, each its own."""

    def __init__(self, results_dir: Path, run_id: str) -> None:
        self.folder = results_dir / "candidates" / run_id
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, ranks: Ranks) -> Candidate | None:
        try:
            return Candidate(**read_json(self.folder / f"{configuration_key(ranks)}.json"))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None

    def write(self, candidate: Candidate) -> None:
        write_json(self.folder / f"{candidate.key}.json", asdict(candidate))


class Asked(Protocol):
    """What a journal knows of any suggestion."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def number(self) -> int: ...

    @property
    def completed_before(self) -> int: ...

    @property
    def completed_at(self) -> int | None: ...


@dataclass(frozen=True)
class Suggestion:
    """One configuration that the sampler suggested, and the result that it was told."""

    number: int
    ranks: Ranks
    completed_before: int
    """How many suggestions had results when the sampler made this one."""
    completed_at: int | None = None
    """It was the completed_at-th to have a result, from 0; None while it is open."""
    state: str | None = None
    """done, stopped (beaten) or failed"""
    accuracy: float | None = None
    """On the selection examples; estimated for one that was stopped."""
    cost: float | None = None
    examples: int = 0
    """That a trial answered; 0 where the ledger knew the configuration."""
    error: str | None = None


S = TypeVar("S", bound=Asked)


class Journal(Generic[S]):
    """The suggestions of one search, in order. kind: makes one, of its number, what is suggested, completed_before."""

    def __init__(self, folder: Path, kind: Callable[..., S]) -> None:
        self.folder, self._kind = folder, kind
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        paths = sorted((folder / "trials").glob("*.json"))
        self.suggestions = [kind(**read_json(path)) for path in paths]

    @property
    def completed(self) -> int:
        return sum(s.completed_at is not None for s in self.suggestions)

    def open(self) -> list[S]:
        return [s for s in self.suggestions if s.completed_at is None]

    def ask(self, suggested: dict[str, Any]) -> S:
        suggestion = self._kind(len(self.suggestions), suggested, self.completed)
        self.suggestions.append(suggestion)
        self._write(suggestion)
        return suggestion

    def tell(self, number: int, **found: Any) -> S:
        suggestion = replace(self.suggestions[number], completed_at=self.completed, **found)
        self.suggestions[number] = suggestion
        self._write(suggestion)
        return suggestion

    def events(self) -> Iterator[tuple[bool, S]]:
        """(is it an asking, suggestion) of everything that happened, in its order."""
        tellings = iter(
            sorted((s for s in self.suggestions if s.completed_at is not None), key=lambda s: s.completed_at or 0)
        )
        completed = 0
        for suggestion in self.suggestions:
            while completed < suggestion.completed_before:
                yield False, next(tellings)
                completed += 1
            yield True, suggestion
        yield from ((False, telling) for telling in tellings)

    def _write(self, suggestion: S) -> None:
        write_json(self.folder / "trials" / f"{suggestion.number:05}.json", asdict(suggestion))


class SearchJournal(Journal[Suggestion]):
    """The suggestions of a search for sub-adapters, and the order of its examples."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Suggestion)

    def stages(self) -> list[list[int]] | None:
        path = self.folder / "stages.json"
        return read_json(path) if path.exists() else None

    def write_stages(self, stages: Sequence[Sequence[int]]) -> None:
        write_json(self.folder / "stages.json", stages)
