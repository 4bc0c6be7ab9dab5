"""Claims about schedules: each against one-shot, and the others among themselves, over cells that differ in nothing
else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from analysis.stats.claims import Claim, claim_of_tests, group_by_scope, holds_for, measured
from analysis.stats.comparisons import PairedTest, Points, compare_values, corrected_tests, swap_sides
from tune_sparse.schedules import ONE_SHOT


def compare_schedules(points: Points) -> list[PairedTest]:
    """Every pair of schedules: over everything, in each base, and at each sparsity where there are several."""
    couples = [
        (a, b, points.accuracies(points.pairs("schedule", a, b)))
        for a, b in combinations(dict.fromkeys(points.pruned["schedule"]), 2)
    ]
    levels = sorted({level for *_, pairs in couples for level in pairs["sparsity"]})
    at_levels = [
        (f"sparsity {level:g}", a, b, pairs[pairs["sparsity"] == level]) for level in levels for a, b, pairs in couples
    ]
    return [*compare_values(points, "schedule"), *(corrected_tests(at_levels, points) if len(levels) > 1 else [])]


def schedule_claims(points: Points, tests: Sequence[PairedTest]) -> Iterator[Claim]:
    """A sentence for each group of tests that hold for the same: those against one-shot, then the others."""
    for about in dict.fromkeys(test.about for test in tests):
        for same in group_by_scope(t for t in tests if t.about == about):
            against = [t for t in same if ONE_SHOT in (t.left, t.right)]
            turned = [swap_sides(t, t.left if t.right == ONE_SHOT else t.right) for t in against]
            others = [t for t in same if t not in against]
            yield from (_claim(about, part, points) for part in (turned, others) if part)


def _claim(about: str, tests: Sequence[PairedTest], points: Points) -> Claim:
    against = tests[0].left == ONE_SHOT
    unit = " accuracy" if points.is_accuracy(tests[0].run_ids[0]) else " log-likelihood a token"
    (where, numbers), parts = holds_for(tests[0]), list[str]()
    for i, test in enumerate(tests):
        words, found = measured(test, unit, i)
        numbers |= found
        parts.append(f"{test.right if against else f'{test.right} minus {test.left}'} {words}{_verdict(test)}")
    start = points.rates.capitalize() if tests[0].scope.has_verdict else f"In these trainings, {points.rates}"
    template = f"{start}, {f'against {ONE_SHOT}: ' if against else ''}{'; '.join(parts)}; {where}."
    return claim_of_tests("RQ5", about, template, numbers, tests, tests[0].named)


def _verdict(test: PairedTest) -> str:
    if not test.scope.has_verdict:
        return ""
    better = "better" if test.estimate.value > 0 else "worse"
    return f", {better}" if test.is_shown else ", no difference can be shown"
