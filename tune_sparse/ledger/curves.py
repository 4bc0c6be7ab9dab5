"""The curves of a sweep over sparsity: what of each was measured, and between which levels it stops passing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from tune_sparse.config.spending import FindRule
from tune_sparse.evaluation.metrics import score_name
from tune_sparse.ledger.choice import lowest, mean_loss, selection_loss
from tune_sparse.ledger.record import Record, SweepRecord, has_ended
from tune_sparse.schedules import ONE_SHOT

KEY = ("backend", "model", "task", "method", "mode", "schedule", "seed")
"""Cells of a curve differ in nothing but their sparsity."""
Z = 1.96
"""An accuracy within so many standard errors of guessing is not shown to be better."""


@dataclass(frozen=True)
class Curve:
    """The cells of one setting over sparsity, each level with the run that serves it, or the runs of all its points."""

    key: tuple[Any, ...]
    """values of `KEY`"""
    dense: tuple[str, ...]
    """the runs at sparsity 0"""
    levels: tuple[float, ...]
    """above 0, ascending"""
    runs: tuple[tuple[str, ...], ...]
    """of each level, one for each point of the sweep's axes"""
    over_seeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{run: those of all seeds at its level and point}"""

    def needed(self, runs: Sequence[str]) -> tuple[str, ...]:
        """What must end before a level that has these runs is measured: with several points those of all seeds, over
        which one is chosen."""
        seeds = (self.over_seeds.get(run, (run,)) for run in runs)
        return tuple(runs) if len(runs) == 1 else tuple(dict.fromkeys(chain(*seeds)))

    @property
    def name(self) -> str:
        """What tells it from the others, without what nearly all share."""
        backend, model, task, method, mode, schedule, seed = self.key
        unusual = [backend] * (backend != "torch") + [schedule] * (schedule != ONE_SHOT) + [f"seed {seed}"] * bool(seed)
        return " ".join(map(str, (model, task, method, mode, *unusual)))


def curves_of(cells: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Group the cells that a sweep requested, in their order, without levels on the way to one. Settings with no
    level above 0 are no curves."""
    by_key: dict[tuple[Any, ...], dict[float, dict[str, str]]] = {}
    seeds: dict[tuple[Any, ...], list[str]] = {}
    for cell in (cell for cell in cells if "chain_to" not in cell):
        key, point = tuple(cell.get(name, ONE_SHOT) for name in KEY), json.dumps(cell.get("axes", {}))
        run = by_key.setdefault(key, {}).setdefault(cell["sparsity"], {}).setdefault(point, cell["run_id"])
        seeds.setdefault((key[:-1], cell["sparsity"], point), []).append(run)
    over_seeds = {run: tuple(dict.fromkeys(runs)) for runs in seeds.values() for run in runs}
    found = []
    for key, by_level in by_key.items():
        runs = {level: tuple(dict.fromkeys(points.values())) for level, points in sorted(by_level.items())}
        dense = runs.pop(0.0, ())
        found.append(Curve(key, dense, tuple(runs), tuple(runs.values()), over_seeds))
    return [curve for curve in found if curve.levels]


@dataclass(frozen=True)
class Score:
    """What a finished run says of its level."""

    value: float
    is_perplexity: bool = False
    before_merge: float | None = None
    """the value before the last mask, where the merge changes it"""
    eval_loss: float | None = None
    """on selection examples, by which one of several points is chosen"""
    is_at_chance: bool = False
    """no better than guessing is, or always giving the commonest answer"""


def score_of(record: Record) -> Score:
    """Read a done record."""
    name = score_name(record.metrics)
    before = record.metrics.get(f"{name}_before_merge")
    value, is_perplexity = record.metrics[name], name == "perplexity"
    at_chance = not is_perplexity and value <= _highest_by_chance(record.metrics)
    return Score(value, is_perplexity, before, selection_loss(record), at_chance)


def _highest_by_chance(metrics: Mapping[str, Any]) -> float:
    """The upper end of the 95% interval of an accuracy that is that of guessing, or of the commonest answer."""
    guessed = max(metrics.get("chance_accuracy") or 0.0, metrics.get("majority_fraction") or 0.0)
    return guessed + Z * math.sqrt(guessed * (1 - guessed) / metrics["n_examples"])


def ended_runs(records: Iterable[Record | None]) -> dict[str, Score | None]:
    """{run: its score, None where it failed or was stopped early} of what has a record that says so."""
    known = [record for record in records if record is not None and has_ended(record)]
    return {record.run_id: score_of(record) if record.status == "done" else None for record in known}


DENSE = {
    "done": "",
    "missing": "nothing can be said: its dense run is not done",
    "failed": "nothing can be said: its dense run has no result",
    "at chance": "nothing to find: its dense run is at chance",
}
"""{state of a dense run: what that says of its curve}"""


@dataclass(frozen=True)
class Bracket:
    """The levels of a curve that were measured, by their places 0, 1, ...; place -1 is the dense run."""

    levels: tuple[float, ...]
    passes: Mapping[int, bool]
    failed: frozenset[int] = frozenset()
    """places whose trainings failed or were stopped early, which says nothing of the curve"""
    dense: str = "done"
    """of `DENSE`: without it nothing passes or fails"""

    @property
    def low(self) -> int:
        """The highest place that passes; the dense run does."""
        return max((place for place, passed in self.passes.items() if passed), default=-1)

    @property
    def high(self) -> int:
        """The lowest place above it that was measured; one past the last where there is none."""
        low = self.low
        return min((place for place in self.passes if place > low), default=len(self.levels))

    def is_decided(self, gap: int) -> bool:
        """Whether a measured pass and a measured fail are at most `gap` levels apart, or every end is reached; or there
        is nothing to find."""
        low, last = self.low, len(self.levels) - 1
        has_ends = low == last or low < self.high <= min(last, low + gap)
        return self.dense == "at chance" or (self.dense == "done" and has_ends)

    @property
    def is_monotone(self) -> bool:
        """Whether no measured level fails below one that passes."""
        return all(passed for place, passed in self.passes.items() if place < self.low)

    @property
    def middle(self) -> int:
        """The highest place that passes, if it is in the middle of those that may be it."""
        return self.low + (self.high - self.low - 1) // 2

    def text(self) -> str:
        """For people: passes 0.5, fails 0.7 (3 runs)."""
        if DENSE[self.dense]:
            return DENSE[self.dense]
        low, high, last = self.low, self.high, len(self.levels) - 1
        parts = [f"passes {self.levels[low]:g}" if low >= 0 else ""]
        parts.append("the highest level: at least that" if low == last else "")
        if high <= last:
            parts.append(f"fails {self.levels[high]:g}" + (", the lowest level: below that" if high == 0 else ""))
        runs = len(self.passes)
        said = ", ".join(filter(None, parts)) or "no level is measured yet"
        said += f" ({runs} run{'s' * (runs != 1)})" if runs else ""
        fails = [f"{self.levels[place]:g}" for place in sorted(self.passes) if place < low and not self.passes[place]]
        said += f"; not monotone: fails {' and '.join(fails)} below" if fails else ""
        broken = [f"{self.levels[place]:g}" for place in sorted(self.failed) if low < place < high]
        return said + (f"; cannot be decided at {' and '.join(broken)}: no result there" if broken else "")

    def as_json(self) -> dict[str, Any]:
        """With levels in place of places; None where a side was not reached."""
        low, high = self.low, self.high
        return {
            "passes": (0.0 if self.dense == "done" else None) if low < 0 else self.levels[low],
            "fails": self.levels[high] if high < len(self.levels) else None,
            "runs": len(self.passes),
            "is_monotone": self.is_monotone,
            "failed": [self.levels[place] for place in sorted(self.failed)],
            "dense": self.dense,
        }


def bracket_of(curve: Curve, ended: Mapping[str, Score | None], rule: FindRule, before_merge: bool = False) -> Bracket:
    """What is known of a curve. ended: {run: its score, None of one that gets no result}.

    before_merge: of the values before the last mask, where they are known.
    """
    status, dense = _chosen(curve, curve.dense, ended)
    if dense is None or dense.is_at_chance:
        return Bracket(curve.levels, {}, dense="at chance" if dense else status)
    passes, failed = dict[int, bool](), set[int]()
    for place, runs in enumerate(curve.runs):
        status, score = _chosen(curve, runs, ended)
        failed |= {place} if status == "failed" else set()
        if score is not None:
            value = score.before_merge if before_merge and score.before_merge is not None else score.value
            passes[place] = rule.passes(value, dense.value, dense.is_perplexity)
    return Bracket(curve.levels, passes, frozenset(failed))


@dataclass(frozen=True)
class KnownCurve:
    """A curve of a sweep that finds, as far as its records say."""

    curve: Curve
    bracket: Bracket
    is_decided: bool

    @property
    def line(self) -> str:
        return f"{self.curve.name}: {self.bracket.text()}" + ("" if self.is_decided else "; not decided")

    def as_json(self) -> dict[str, Any]:
        named = dict(zip(KEY, self.curve.key, strict=True))
        return named | self.bracket.as_json() | {"is_decided": self.is_decided, "text": self.bracket.text()}


def curve_lines(curves: Sequence[KnownCurve], most: int = 60) -> list[str]:
    """The bracket of each curve; of more than `most` those that are not decided."""
    if len(curves) <= most:
        return [curve.line for curve in curves]
    left = [curve.line for curve in curves if not curve.is_decided]
    more = [f"and {len(left) - most} more"] if len(left) > most else []
    return [f"{len(curves) - len(left)} of {len(curves)} curves are decided", *left[:most], *more]


def known_curves(sweep: SweepRecord, record: Callable[[str], Record | None]) -> list[KnownCurve]:
    """The curves of a sweep that finds; none of any other. record: of a run."""
    rule = FindRule.parse(sweep.chosen_by["find"]) if sweep.chosen_by else None
    if rule is None or sweep.chosen_by is None:
        return []
    ended = ended_runs(map(record, sweep.run_ids))
    brackets = [(curve, bracket_of(curve, ended, rule)) for curve in curves_of(sweep.cells)]
    gap = sweep.chosen_by["find_levels"]
    return [KnownCurve(curve, bracket, bracket.is_decided(gap)) for curve, bracket in brackets]


def _chosen(curve: Curve, runs: Sequence[str], ended: Mapping[str, Score | None]) -> tuple[str, Score | None]:
    """Whether a level that has these runs is done, failed or missing, and its score: of several points that which
    `ledger.choice` chooses, over all seeds of the sweep."""
    if not runs or any(run not in ended for run in curve.needed(runs)):
        return "missing", None
    seeds = [curve.over_seeds.get(run, ()) for run in runs] if len(runs) > 1 else [()]
    scores = ([ended[run] for run in same] for same in seeds)
    place = lowest([mean_loss([score.eval_loss if score else None for score in same]) for same in scores])
    score = None if place is None else ended[runs[place]]
    return ("done" if score else "failed"), score
