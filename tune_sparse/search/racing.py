"""Racing: candidates answer the same examples in stages, and by a lenient rule one that falls behind stops. Pure.

Whether one is better is asked on the examples that both answered: of those on which they differ, each is right on half
if they are equally good (McNemar's exact test). It is asked after each stage, against every rival, and nothing corrects
for that: most candidates that are as good as the rest stop too. It saves answers, and shows of nobody that he is worse.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from analysis.stats.paired import difference_interval, mcnemar_p

LEVEL_OF_FRONT, LEVEL_OF_BEST = 0.1, 0.15
"""A candidate stops when another is more accurate with at most this p-value; the first where costs count too, since
each member of a front is wanted. They are of single comparisons, chosen by what they cost and lose: of 60 equally good
candidates 65% and 90% are stopped (docs/search.md)."""
STAGES = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""The fractions of the examples that are answered after each stage."""
WARM_UP = 8
"""So many candidates answer everything; on what they disagree is asked first from then on."""


@dataclass(frozen=True)
class Correctness:
    """Which of n examples were answered, and which of them rightly, as bits."""

    n: int
    known: int = 0
    right: int = 0

    @classmethod
    def from_text(cls, text: str) -> Correctness:
        """Read one character an example: 1 right, 0 wrong, - not answered."""
        bits = [sum(1 << i for i, c in enumerate(text) if c in chosen) for chosen in ("01", "1")]
        return cls(len(text), *bits)

    def __str__(self) -> str:
        return "".join("-" if not self.knows(i) else str(self.right >> i & 1) for i in range(self.n))

    def knows(self, i: int) -> bool:
        return bool(self.known >> i & 1)

    def adding(self, correct: Iterable[tuple[int, bool]]) -> Correctness:
        known, right = self.known, self.right
        for i, is_right in correct:
            known |= 1 << i
            right = right | 1 << i if is_right else right & ~(1 << i)
        return Correctness(self.n, known, right)

    @property
    def count(self) -> int:
        return self.known.bit_count()

    @property
    def is_complete(self) -> bool:
        return self.count == self.n

    @property
    def accuracy(self) -> float:
        """The fraction of the answered examples, at least one, that is right."""
        return self.right.bit_count() / self.count


def discordant_counts(a: Correctness, b: Correctness) -> tuple[int, int]:
    """On how many examples that both answered only a, and only b, is right."""
    both = a.known & b.known
    return (a.right & ~b.right & both).bit_count(), (b.right & ~a.right & both).bit_count()


@cache
def p_value(wins: int, losses: int) -> float:
    """How likely at least so many wins are, if win and loss were equally likely: one-sided McNemar, exact."""
    return mcnemar_p(wins, losses, "greater")


def accuracy_difference(a: Correctness, b: Correctness) -> tuple[float, float, float]:
    """The accuracy of a less that of b on the examples that both answered, and the ends of its paired interval."""
    count = (a.known & b.known).bit_count()
    wins, losses = discordant_counts(a, b)
    return (wins - losses) / count, *difference_interval(wins, losses, count)


def most_divisive_first(answered: Sequence[Correctness], n: int, seed: int) -> list[int]:
    """All examples, those first on which the complete candidates `answered` are most divided; shuffled among equals."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    rights = [sum(m.right >> i & 1 for m in answered) for i in range(n)]
    return sorted(order, key=lambda i: -rights[i] * (len(answered) - rights[i]))


def cut_stages(order: Sequence[int], fractions: Sequence[float] = STAGES) -> list[list[int]]:
    """`order` cut where the fractions say; no stage is empty."""
    ends = [round(fraction * len(order)) for fraction in fractions]
    cuts = zip([0, *ends], ends, strict=False)
    return [list(order[start:end]) for start, end in cuts if end > start]


@dataclass
class Race:
    """The candidates of a search: their costs and what they answered so far."""

    n: int
    minimises_cost: bool
    """Whether a cheaper candidate is spared by a better one that costs more."""
    costs: dict[str, float] = field(default_factory=dict)
    correctness: dict[str, Correctness] = field(default_factory=dict)

    def update(self, key: str, cost: float, correctness: Correctness) -> None:
        self.costs[key], self.correctness[key] = cost, correctness

    @property
    def level(self) -> float:
        return LEVEL_OF_FRONT if self.minimises_cost else LEVEL_OF_BEST

    def beaten_by(self, key: str) -> str | None:
        """A candidate that costs no more, where costs count, and is ahead by the lenient rule: the one that answered
        most."""
        mine, cost = self.correctness[key], self.costs[key]
        rivals = [k for k in self.correctness if k != key and (not self.minimises_cost or self.costs[k] <= cost)]
        better = [k for k in rivals if p_value(*discordant_counts(self.correctness[k], mine)) <= self.level]
        return max(better, key=lambda k: (self.correctness[k].count, self.correctness[k].accuracy), default=None)

    def estimate(self, key: str, beater: str | None) -> float:
        """The accuracy on all examples: counted, or that of the beater less what was lost to it, which is taken for
        all that would be lost: the examples left are those that divide candidates least."""
        mine = self.correctness[key]
        if beater is None or mine.is_complete:
            return mine.accuracy
        wins, losses = discordant_counts(self.correctness[beater], mine)
        return self.correctness[beater].accuracy - (wins - losses) / self.n

    def complete(self) -> list[str]:
        return [key for key, correctness in self.correctness.items() if correctness.is_complete]

    def front(self) -> list[str]:
        """The complete candidates that no other is at least as accurate and cheap as, the cheapest first."""
        return pareto_front({key: (self.correctness[key].accuracy, self.costs[key]) for key in self.complete()})

    def winner(self) -> str:
        """The cheapest of the front whose accuracy is within one paired standard error of the best, that of McNemar's
        test (the rule of Breiman et al. 1984, section 3.4.3); without costs the most accurate."""
        front = self.front()
        best = front[-1]
        if not self.minimises_cost:
            return best
        counts = {key: discordant_counts(self.correctness[best], self.correctness[key]) for key in front}
        return next(key for key, (wins, losses) in counts.items() if (wins - losses) ** 2 <= wins + losses)


def hypervolume(points: Collection[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that (accuracy, cost) points dominate, down to the reference accuracy and cost."""
    area, lowest_accuracy = 0.0, reference[0]
    for accuracy, cost in sorted(points, key=lambda point: point[1]):
        if accuracy > lowest_accuracy and cost < reference[1]:
            area += (accuracy - lowest_accuracy) * (reference[1] - cost)
            lowest_accuracy = accuracy
    return area


def pareto_front(points: Mapping[str, tuple[float, float]], keep_equal: bool = False) -> list[str]:
    """The keys of the (accuracy, cost) points that no other is at least as accurate and cheap as, the cheapest first;
    of equal points the first key, or with `keep_equal` every key."""
    front: list[str] = []
    for key in sorted(points, key=lambda k: (points[k][1], -points[k][0], k)):
        best = points[front[-1]] if front else None
        if best is None or points[key][0] > best[0] or (keep_equal and points[key] == best):
            front.append(key)
    return front
