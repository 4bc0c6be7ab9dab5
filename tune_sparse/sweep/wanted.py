"""Which runs of a plan start, and in which order: all of them, or those that `--find` wants, within a budget or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tune_sparse.config import SweepConfig
from tune_sparse.config.options import rule
from tune_sparse.errors import InputError
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.curves import Curve, curves_of, ended_runs, score_of
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.budget import Budget
from tune_sparse.sweep.chains import Chains
from tune_sparse.sweep.find import Finder
from tune_sparse.sweep.forecast import longest_first
from tune_sparse.sweep.plan import Plan
from tune_sparse.sweep.sources import Found, Listed, Source, Within


class WantedRuns:
    """Hands out the missing runs of a plan as its config asks, or all of them if `everything`."""

    def __init__(self, plan: Plan, ledger: LedgerReader, missing: Sequence[Run], everything: bool) -> None:
        self.missing = missing
        self._chains = Chains(ledger, missing)
        limit = None if everything else plan.config.budget_limit
        self.finder = None if everything else make_finder(plan, ledger, missing)
        self.budget = Budget(limit, plan, ledger) if limit else None
        self._waiting = list(missing) if self.is_chosen else longest_first(plan, ledger, missing)

    def sources(self, queue_of: Callable[[Run], str], order: Callable[[str], int]) -> dict[str, Source]:
        """{kind of hardware: the runs that wait for it}, in the order of the kinds."""
        names = sorted(set(map(queue_of, self._waiting)), key=order)
        return {name: self._source([run for run in self._waiting if queue_of(run) == name]) for name in names}

    @property
    def has_next(self) -> bool:
        """Whether any run starts at all."""
        return any(source.peek() is not None for source in self.sources(lambda run: "", lambda name: 0).values())

    def _source(self, runs: Sequence[Run]) -> Source:
        listed = Listed(runs, self._chains.is_ready)
        source = Found(self.finder, {run.run_id: run for run in runs}) if self.finder else listed
        return Within(source, self.budget) if self.budget else source

    @property
    def is_chosen(self) -> bool:
        """Whether some of the missing runs may not start."""
        return bool(self.finder or self.budget)

    def ended(self, record: Record) -> list[str]:
        """Take note of how a run ended; returns a line for each curve that wants no more."""
        self._chains.ended(record)
        if self.budget:
            self.budget.ended(record)
        if self.finder is None:
            return []
        closed = self.finder.ended(record.run_id, score_of(record) if record.status == "done" else None)
        return [f"{self.finder.curves[number].name}: {self.finder.brackets[number].text()}" for number in closed]

    def describe(self, run_id: str | None = None) -> str:
        """Say what is known of the curve of a run, or without one how far all of it is."""
        if self.finder is None or run_id is None:
            curves = f"{self.finder.decided} of {len(self.finder.curves)} curves decided" if self.finder else ""
            budget = f"{self.budget.left:.3g} of {self.budget.limit} left" if self.budget else ""
            return ", ".join(filter(None, (curves, budget)))
        number = self.finder.curve_of(run_id)
        return "" if number is None else self.finder.brackets[number].text()

    @property
    def spent(self) -> str | None:
        """Why nothing more is started, if that is the budget."""
        if self.budget is None or self.budget.stopped_before is None:
            return None
        return f"the budget of {self.budget.limit} is spent but for {self.budget.left:.3g}"

    def lines(self) -> list[str]:
        """Say which runs were left because what they begin from is not done."""
        return [] if self.finder or self.budget else self._chains.lines()


def asked_of(config: SweepConfig) -> dict[str, Any] | None:
    """How a sweep chooses among its runs, as its record keeps it; None where it runs all of them."""
    if not config.find and config.budget is None:
        return None
    names = ("find", "find_levels", "budget", "compare_at")
    values = ((name, getattr(config, name)) for name in names)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


def check_fixed(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `InputError` where levels are compared that were not fixed before the first start."""
    before, after = sorted(earlier["compare_at"]), sorted(now["compare_at"])
    rule(
        before == after,
        f"compare_at is fixed before the first run, so that no result chooses it: it was {before or 'not given'}",
        after or "nothing",
        "Give the same, or finish the matrix without find and budget.",
    )


def make_finder(plan: Plan, ledger: LedgerReader, missing: Sequence[Run]) -> Finder | None:
    config, rule_ = plan.config, plan.config.find_rule
    if rule_ is None:
        return None
    wanted = {run.run_id for run in missing}
    ended = ended_runs(ledger.record(run_id) for run_id in plan.runs)
    return Finder(
        curves_of(plan.record.cells),
        rule_,
        config.find_levels,
        config.compare_at,
        {run_id: score for run_id, score in ended.items() if run_id not in wanted},
        {run_id: before.run_id for run_id, run in plan.runs.items() if (before := run.level_before)},
    )


def check_budget(plan: Plan, ledger: LedgerReader, missing: Sequence[Run]) -> None:
    """Raise `InputError` for a budget of hours that is known not to buy one run, or with `--find` one bracket."""
    limit, finder = plan.config.budget_limit, make_finder(plan, ledger, missing)
    if limit is None or (finder and finder.decided):
        return
    budget = Budget(limit, plan, ledger)
    prices = {curve.name: _price(curve, plan, budget) for curve in (finder.curves if finder else ())}
    known = {name: price for name, price in prices.items() if price is not None}
    if known and len(known) == len(prices) and min(known.values()) > limit.amount:
        name = min(known, key=known.__getitem__)
        raise InputError(
            f"a budget with find must buy one bracket: the cheapest, a dense run and two levels of {name}, takes about "
            f"{known[name]:.3g} {limit.unit}, got {limit}. Raise it."
        )


def _price(curve: Curve, plan: Plan, budget: Budget) -> float | None:
    """The dense run and two levels, with all their points, and the seeds over which one is chosen; None where nothing
    like them was measured."""
    levels = (curve.dense, curve.runs[0], curve.runs[-1])
    prices = [budget.expected(plan.runs[run]) for runs in levels for run in curve.needed(runs)]
    return None if None in prices else sum(filter(None, prices))
