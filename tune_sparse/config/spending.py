"""Which runs of a matrix are worth their cost: `--find` and `--budget` as a user writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tune_sparse.config.options import rule

UNITS = {"runs": "trainings", "cpu-hours": "hours x CPUs", "gpu-hours": "hours x GPUs", "cs3-hours": "hours x CS-3s"}
"""{unit of a budget: its meaning}"""
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
