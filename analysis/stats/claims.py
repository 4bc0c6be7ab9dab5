"""A claim in words, with the numbers in it, and the runs behind each number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from analysis.stats.comparisons import PairedTest

QUESTIONS = {
    "RQ1": "How does sparsity affect the accuracy of fine-tuned models?",
    "RQ2": "Which pruning method is best?",
    "RQ3": "Is sparse-to-sparse better than sparse-to-dense?",
    "RQ4": "How does the CS-3 compare with GPUs?",
}


@dataclass(frozen=True)
class Number:
    """A number as it is shown, and the runs that it was computed from."""

    value: float | None
    """None where it was not measured, such as a rate of too few steps"""
    shown: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """A sentence or two: every number of a result stands in `numbers`, by its name in the template."""

    question: str
    about: str
    template: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    test: str | None = None
    """what carries the claim; None where it only describes the runs at hand"""

    @property
    def text(self) -> str:
        return self.template.format(**{name: number.shown for name, number in self.numbers.items()})

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run for number in self.numbers.values() for run in number.run_ids))

    def as_json(self) -> dict[str, Any]:
        numbers = {
            name: {"value": n.value, "shown": n.shown, "run_ids": list(n.run_ids)} for name, n in self.numbers.items()
        }
        described = {"question": self.question, "about": self.about, "text": self.text, "template": self.template}
        return described | {"test": self.test, "numbers": numbers}


def number(value: float, run_ids: Iterable[str], form: str = ".3f") -> Number:
    runs = tuple(dict.fromkeys(run_ids))
    return Number(None, "unknown", runs) if math.isnan(value) else Number(float(value), format(value, form), runs)


def interval(test: PairedTest, form: str = "+.3f") -> dict[str, Number]:
    """The numbers of a test: difference, low, high, p, cells."""
    e = test.estimate
    p = Number(test.p_corrected, _p(test.p_corrected), test.run_ids)
    values = {"difference": e.value, "low": e.low, "high": e.high}
    return {name: number(value, test.run_ids, form) for name, value in values.items()} | {
        "p": p,
        "cells": number(test.cells, test.run_ids, ".0f"),
    }


def estimate_numbers(value: float, low: float, high: float, runs: Iterable[str]) -> dict[str, Number]:
    runs = list(runs)
    return {name: number(v, runs, "+.3f") for name, v in (("difference", value), ("low", low), ("high", high))}


def escaped(text: str) -> str:
    """Text that is no template."""
    return text.replace("{", "{{").replace("}", "}}")


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def headlines(claims: Iterable[Claim]) -> list[str]:
    """A line for each question: its first claim, which is the most general one."""
    first: dict[str, str] = {}
    for claim in claims:
        first.setdefault(claim.question, f"{claim.question}: {claim.text}")
    return [first[question] for question in QUESTIONS if question in first]


def as_markdown(claims: Iterable[Claim], seeds: str, audit_summary: str) -> str:
    """The findings as a page: for each question what holds everywhere, then each base, with what it rests on."""
    listed = list(claims)
    lines = ["# Findings", "", audit_summary, "", seeds]
    for question, words in QUESTIONS.items():
        lines += ["", f"## {question}: {words}"]
        same_question = [claim for claim in listed if claim.question == question]
        for about in dict.fromkeys(claim.about for claim in same_question):
            lines += ["", f"**{about}**", ""]
            for claim in (claim for claim in same_question if claim.about == about):
                lines.append(f"- {claim.text}" + (f" *({claim.test})*" if claim.test else ""))
    return "\n".join(lines) + "\n"
