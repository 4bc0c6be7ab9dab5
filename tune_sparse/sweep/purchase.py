"""How many runs `--find` still takes, and what `--budget` buys of them, before any of them starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul

from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.curves import Bracket
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.budget import Budget
from tune_sparse.sweep.find import Finder, next_level
from tune_sparse.sweep.plan import Plan
from tune_sparse.sweep.wanted import make_finder

Range = tuple[int, int]
"""The fewest and the most: it depends on how good the answers of neighbours are."""


@dataclass(frozen=True)
class Purchase:
    """What a sweep with find or a budget is going to run."""

    curves: int
    """0 without find"""
    decided: int
    """already"""
    runs: Range
    """that are missing to decide all, or without find that are missing"""
    budget: str | None
    left: float | None
    """of the budget; None without one"""
    buys_curves: Range
    """decided by the end of the budget"""
    buys_runs: int
    """in the order of the plan, without find"""

    def lines(self) -> list[str]:
        least, most = self.runs
        bought = f"the budget of {self.budget} has {self.left:.3g} left, which buys" if self.left is not None else ""
        if not self.curves:
            return [f"T{bought[1:]} {self.buys_runs} of {most} runs, in the order of the plan"]
        lines = [
            f"To find: {self.curves} curves, {self.decided} decided; all take {_words(least, most)} more runs, each "
            "with a level that passes and one that fails"
        ]
        curves = f"{_words(*self.buys_curves)} decided curves"
        return [*lines, *([f"  {bought} {curves}, those of every model and task in turn"] if bought else [])]


def purchase(plan: Plan, ledger: LedgerReader, missing: Sequence[Run]) -> Purchase | None:
    """What a plan's find and budget ask for; None without them. A run whose price is unknown counts nothing."""
    finder, limit = make_finder(plan, ledger, missing), plan.config.budget_limit
    if finder is None and limit is None:
        return None
    budget = Budget(limit, plan, ledger) if limit else None
    left = budget.left if budget else None
    if finder is None:
        prices = [(budget.expected(run) or 0.0) if budget else 0.0 for run in missing]
        return Purchase(0, 0, (len(missing), len(missing)), str(limit), left, (0, 0), _affordable(prices, left))
    fixed = [run for run in finder.fixed if run not in finder.known]
    left_open = [number for number in range(len(finder.curves)) if not finder.is_decided(number)]
    counts = [needed_levels(finder.brackets[number], finder.gap) for number in left_open]
    points = [len(finder.curves[number].runs[-1]) for number in left_open]
    best, worst = ([count[side] for count in counts] for side in (0, 1))
    least, most = (sum(map(mul, levels, points)) for levels in (best, worst))
    runs = len(fixed) + least, len(fixed) + most
    buys = _bought(plan, finder, budget, fixed, worst), _bought(plan, finder, budget, fixed, best)
    return Purchase(len(finder.curves), finder.decided, runs, str(limit) if limit else None, left, buys, 0)


def needed_levels(bracket: Bracket, gap: int) -> Range:
    """The fewest and the most levels that decide a curve, over all answers that it may have."""
    known = replace(bracket, dense="done")
    answers = range(known.low, known.high)
    return (
        min(_steps(known, gap, answer, hint=answer) for answer in answers),
        max(_steps(known, gap, answer, hint=None) for answer in answers),
    )


def _steps(bracket: Bracket, gap: int, answer: int, hint: int | None) -> int:
    count = 0
    while (place := next_level(bracket, gap, hint)) is not None:
        bracket = replace(bracket, passes={**bracket.passes, place: place <= answer})
        count += 1
    return count


def _bought(plan: Plan, finder: Finder, budget: Budget | None, fixed: Sequence[str], counts: Sequence[int]) -> int:
    """How many curves are decided by the end of the budget, if each takes so many levels."""
    if budget is None:
        return len(finder.curves)

    def price(run_id: str) -> float:
        return budget.expected(plan.runs[run_id]) or 0.0

    levels = [curve.runs[-1] for number, curve in enumerate(finder.curves) if not finder.is_decided(number)]
    prices = [count * sum(map(price, level)) for level, count in zip(levels, counts, strict=True)]
    left = budget.left - sum(map(price, fixed))
    return finder.decided + (_affordable(prices, left) if left > 0 else 0)


def _affordable(prices: Sequence[float], left: float | None) -> int:
    """How many of them, one after the other."""
    count, total = 0, 0.0
    for price in prices:
        total += price
        if left is not None and total > left + 1e-9:
            break
        count += 1
    return count


def _words(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"
