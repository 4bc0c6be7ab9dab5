"""The next run of `--find`: bisection of each curve, from a neighbour's answer to a measured pass beside a fail.

Nothing here knows of Ray: what to run next follows from which runs ended, with which scores, and which are running, so
that a sweep that was killed goes on as if it had not been.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain

from tune_sparse.config.spending import FindRule
from tune_sparse.ledger.curves import KEY, Bracket, Curve, Score, bracket_of

NEAREST = ("seed", "backend", "mode", "schedule", "method", "model")
"""A curve starts at the answer of those that differ from it in the first of these that has any."""


def next_level(bracket: Bracket, gap: int, hint: int | None = None) -> int | None:
    """The place to measure next; None where the bracket is decided, or every level between its ends failed.

    hint: the place that is thought to be the highest that passes.
    """
    low, high = bracket.low, bracket.high
    unknown = [place for place in range(low + 1, high) if place not in bracket.failed]
    if bracket.dense != "done" or bracket.is_decided(gap) or not unknown:
        return None
    wanted = _wanted(low, high, len(bracket.levels), gap, hint)
    return min(unknown, key=lambda place: abs(place - wanted))


def _wanted(low: int, high: int, count: int, gap: int, hint: int | None) -> int:
    """The hint, then what is `gap` beside it, which ends a bracket if the hint was right, then the middle."""
    if high == count and count - 1 - low <= gap:
        return count - 1
    if hint is not None and low < hint < high:
        return hint
    if hint is not None and 0 <= low - hint < gap:
        return low + gap
    if hint is not None and 0 <= hint - high < gap:
        return high - gap
    return (low + high) // 2


class Finder:
    """Chooses runs until every curve is decided.

    First the dense runs, then the levels at which settings are compared, which no result may choose, then bisection. A
    curve has one run at a time, and is served until it is decided; then comes one of the model and task of which the
    fewest were begun, so that what a budget buys is whole brackets, of everything in turn.

    gap: levels between a pass and a fail that are enough. ended: {run: its score, None where it failed for good}.
    before: {run: the one that it begins from}, which runs first.
    """

    def __init__(
        self,
        curves: Sequence[Curve],
        rule: FindRule,
        gap: int = 1,
        compare_at: Collection[float] = (),
        ended: Mapping[str, Score | None] | None = None,
        before: Mapping[str, str] | None = None,
    ) -> None:
        self.curves, self._rule, self.gap, self._before = curves, rule, gap, before or {}
        self.known, self._running = dict(ended or {}), set[str]()
        compared = (curve.runs[curve.levels.index(level)] for level in sorted(compare_at) for curve in curves)
        self.fixed = dict.fromkeys(chain(*(curve.dense for curve in curves), *compared))
        self._neighbours = _neighbours(curves)
        self._curves_of: dict[str, set[int]] = {}
        for number, curve in enumerate(curves):
            for run in chain(*map(curve.needed, (curve.dense, *curve.runs))):
                for own in self._way_to(run):
                    self._curves_of.setdefault(own, set()).add(number)
        self._lose(run for run, score in self.known.items() if score is None)
        self.brackets = [bracket_of(curve, self.known, rule) for curve in curves]
        self._open = {n for n, bracket in enumerate(self.brackets) if next_level(bracket, gap) is not None}
        self._begun = {n for run in self.known.keys() - self.fixed.keys() for n in self._curves_of.get(run, ())}

    def next(self, may_run: Callable[[str], bool] = lambda run: True) -> str | None:
        """The run to start now, of those that `may_run`; None where there is none until another has ended."""
        fixed = (self._way_to(run)[0] for run in self.fixed if run not in self.known)
        wanted = chain((run for run in fixed if run not in self._running), map(self._of_curve, self._in_turn()))
        return next(filter(may_run, wanted), None)

    def started(self, run: str) -> None:
        self._running.add(run)
        if run not in self.fixed:
            self._begun |= self._curves_of[run]

    def ended(self, run: str, score: Score | None) -> list[int]:
        """Take note of a run; returns the curves that want no more. score: None of a run that failed for good."""
        self._running.discard(run)
        self.known[run] = score
        self._lose([run] if score is None else [])
        closed = []
        for number in self._curves_of.get(run, ()):
            self.brackets[number] = bracket_of(self.curves[number], self.known, self._rule)
            if next_level(self.brackets[number], self.gap) is not None:
                self._open.add(number)
            elif number in self._open:
                self._open.discard(number)
                closed.append(number)
        return closed

    def stopped(self, run: str) -> None:
        """It ended without a result, and may be chosen again."""
        self._running.discard(run)

    def is_decided(self, number: int) -> bool:
        return self.brackets[number].is_decided(self.gap)

    @property
    def decided(self) -> int:
        """How many curves are."""
        return sum(map(self.is_decided, range(len(self.curves))))

    def curve_of(self, run: str) -> int | None:
        """The curve of which a run is a level, or leads to one; None for one that several share."""
        needed = self._curves_of.get(run, set())
        own = {number for number in needed if any(run in level for level in self.curves[number].runs)} or needed
        return next(iter(own)) if len(own) == 1 else None

    def _in_turn(self) -> list[int]:
        """The curves that want a run, the one to serve first."""
        busy = {number for run in self._running for number in self._curves_of[run]}
        begun = Counter(_block(self.curves[number]) for number in self._begun)
        return sorted(self._open - busy, key=lambda n: (n not in self._begun, begun[_block(self.curves[n])], n))

    def _of_curve(self, number: int) -> str:
        """The run that an open curve wants: another point of a level that has some, or the next level."""
        bracket, curve = self.brackets[number], self.curves[number]
        runs = [curve.needed(level) for level in curve.runs]
        between = runs[bracket.low + 1 : bracket.high]
        begun = (level for level in between if 0 < sum(run in self.known for run in level) < len(level))
        if (level := next(begun, None)) is None:
            place = next_level(bracket, self.gap, self._hint(number))
            assert place is not None, "the curve is open"
            level = runs[place]
        return self._way_to(next(run for run in level if run not in self.known))[0]

    def _way_to(self, run: str) -> list[str]:
        """The runs that are not done and lead to one, in their order, and the run itself."""
        way = [run]
        while (before := self._before.get(way[0])) and self.known.get(before) is None:
            way.insert(0, before)
        return way

    def _lose(self, failed: Iterable[str]) -> None:
        """What would begin from a failed run has failed with it."""
        lost = set(failed)
        while lost:
            lost = {run for run, before in self._before.items() if before in lost and run not in self.known}
            self.known |= dict.fromkeys(lost)

    def _hint(self, number: int) -> int | None:
        """The middle answer of the nearest curves that are decided. A curve whose mode masks once more at its end says
        most before that mask: the other mode of a pair has no such end."""
        curve = self.curves[number]
        for name in NEAREST:
            others = [other for other in self._neighbours[name][_without(curve, name)] if self._has_answer(other)]
            found = [self._answer(other, before_merge=name == "mode") for other in others]
            if found:
                return statistics.median_low(found)
        return None

    def _has_answer(self, number: int) -> bool:
        return self.brackets[number].dense == "done" and self.is_decided(number)

    def _answer(self, number: int, before_merge: bool) -> int:
        if not before_merge:
            return self.brackets[number].middle
        bracket = bracket_of(self.curves[number], self.known, self._rule, before_merge=True)
        return bracket.low if bracket.high == len(bracket.levels) else bracket.middle


def _block(curve: Curve) -> tuple[object, ...]:
    return curve.key[KEY.index("model")], curve.key[KEY.index("task")]


def _without(curve: Curve, name: str) -> tuple[object, ...]:
    place = KEY.index(name)
    return (*curve.key[:place], *curve.key[place + 1 :], curve.levels)


def _neighbours(curves: Sequence[Curve]) -> dict[str, dict[tuple[object, ...], list[int]]]:
    """{name of `NEAREST`: {what else makes a curve: the curves that have it}}"""
    found: dict[str, dict[tuple[object, ...], list[int]]] = {name: {} for name in NEAREST}
    for name, groups in found.items():
        for number, curve in enumerate(curves):
            groups.setdefault(_without(curve, name), []).append(number)
    return found
