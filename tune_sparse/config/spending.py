"""Which runs of a matrix are worth their cost: `--find` and `--budget` as a user writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tune_sparse.config.options import rule

UNITS = {"runs": "trainings", "cpu-hours": "hours x CPUs", "gpu-hours": "hours x GPUs", "cs3-hours": "hours x CS-3s"}
"""{unit of a budget: its meaning}"""
BRACKET_RUNS = 3
"""The fewest of a bracket: the dense one, one that passes, one that fails."""
ROUNDING = 1e-9
"""Accuracies that are equal on paper differ by less."""


@dataclass(frozen=True)
class FindRule:
    """What a level of a curve must keep of its dense run."""

    within: float | None
    """accuracy, or what the task is judged by, is at least 1 - within of the dense one"""
    perplexity: float | None
    """a perplexity is at most so many times the dense one; None where no text is asked"""

    @classmethod
    def parse(cls, texts: Sequence[str]) -> FindRule | None:
        """Read `within=0.10` and `perplexity=1.10`, either or both. Raises `InputError` for anything else."""
        if not texts:
            return None
        found: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition("=")
            is_known = name in ("within", "perplexity") and name not in found and re.fullmatch(r"\d*\.?\d+", value)
            rule(bool(is_known), "find takes within=FRACTION and perplexity=RATIO", text, "Give within=0.10, say.")
            found[name] = float(value)
        within, ratio = found.get("within"), found.get("perplexity")
        rule(within is None or 0 < within < 1, "within must be in (0, 1)", within, "Give 0.10 for 10%, say.")
        rule(ratio is None or ratio > 1, "perplexity is a ratio to dense, above 1", ratio, "Give 1.10 for 10%, say.")
        return cls(within, ratio)

    def passes(self, value: float, dense: float, is_perplexity: bool) -> bool:
        """Whether a level keeps enough. Raises `ValueError` where there is no rule for its metric."""
        limit = self.perplexity if is_perplexity else self.within
        if limit is None:
            raise ValueError("no rule for this metric")
        return value <= limit * dense + ROUNDING if is_perplexity else value >= (1 - limit) * dense - ROUNDING


@dataclass(frozen=True)
class BudgetLimit:
    """How much a sweep may take, of everything that its matrix has taken so far."""

    amount: float
    unit: str
    """of `UNITS`"""

    @classmethod
    def parse(cls, text: str) -> BudgetLimit:
        """Read `40runs` or `2.5gpu-hours`. Raises `InputError` for anything else, and for nothing."""
        known = re.fullmatch(r"(\d*\.?\d+)\s*([a-z0-9-]+)", text)
        is_known = known is not None and known[2] in UNITS and float(known[1]) > 0
        rule(
            is_known,
            f"a budget is a number above 0 with one of the units {', '.join(UNITS)}",
            text,
            "Give 40runs, say.",
        )
        assert known is not None
        return cls(float(known[1]), known[2])

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


def check_spending(
    find: Sequence[str], find_levels: int, budget: str | None, compare_at: Sequence[float], sparsities: Sequence[float]
) -> None:
    """Raise `InputError` for settings of a sweep that cannot be met, or that contradict each other."""
    found, limit = FindRule.parse(find), BudgetLimit.parse(budget) if budget is not None else None
    levels = [sparsity for sparsity in sparsities if sparsity]
    if found is not None:
        rule(0.0 in sparsities, "find compares with the dense run, so sparsities must have 0", sparsities, "Add 0.")
        rule(len(levels) > 1, "find needs at least two sparsities above 0", sparsities, "Add some.")
        is_enough = limit is None or limit.unit != "runs" or limit.amount >= BRACKET_RUNS
        bracket = "a budget with find must buy one bracket, a dense run, a level that passes and one that fails"
        rule(is_enough, f"{bracket}: {BRACKET_RUNS} runs", budget, "Raise it.")
    rule(find_levels >= 1, "find_levels must be at least 1", find_levels, "Give 1, or 3 for fewer runs.")
    is_needed = find_levels == 1 or found is not None
    rule(is_needed, "find_levels goes with find", find_levels, "Give find=within=0.10, say, or leave it out.")
    is_chosen = found is not None or limit is not None
    whole = "compare_at fixes what find and budget may not choose; without them every cell is compared"
    rule(is_chosen or not compare_at, whole, compare_at, "Leave it out.")
    listed = " ".join(f"{level:g}" for level in levels)
    some = "compare_at takes some of the sparsities above 0"
    rule(set(compare_at) <= set(levels), some, compare_at, f"Choose from {listed}.")
