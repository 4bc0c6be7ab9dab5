"""A claim in words, with the numbers in it, and the runs behind each number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.stats.comparisons import ALL_BASES, PairedTest
from analysis.stats.scopes import Differences, Scope

QUESTIONS = {
    "RQ1": "How does sparsity affect the accuracy of fine-tuned models?",
    "RQ2": "Which pruning method is best?",
    "RQ3": "Is sparse-to-sparse better than sparse-to-dense?",
    "RQ4": "How does the CS-3 compare with GPUs?",
    "RQ5": "Do masks that change during the training help?",
}


@dataclass(frozen=True)
class Number:
    """A number as it is shown, and the runs that it was computed from."""

    value: float | None
    """None where it is not known, such as a rate of too few steps"""
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
    scope: Scope | None = None
    """what it holds for; None where it only describes the runs at hand"""
    is_headline: bool = False
    """whether it answers its question in one line, beside no claim of a larger scope"""

    @property
    def text(self) -> str:
        return self.template.format(**{name: number.shown for name, number in self.numbers.items()})

    @property
    def basis(self) -> str:
        """What the claim holds for, and what carries it."""
        return "; ".join(part for part in (self.scope.value if self.scope else None, self.test) if part)

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run for number in self.numbers.values() for run in number.run_ids))

    def as_json(self) -> dict[str, Any]:
        numbers = {
            name: {"value": n.value, "shown": n.shown, "run_ids": list(n.run_ids)} for name, n in self.numbers.items()
        }
        described = {"question": self.question, "about": self.about, "text": self.text, "template": self.template}
        scope = self.scope.value if self.scope else None
        return described | {"scope": scope, "test": self.test, "is_headline": self.is_headline, "numbers": numbers}


def number(value: float, run_ids: Iterable[str], form: str = ".3f") -> Number:
    runs = tuple(dict.fromkeys(run_ids))
    return Number(float(value), format(value, form), runs) if math.isfinite(value) else Number(None, "unknown", runs)


def measured(test: PairedTest, unit: str = "", suffix: object = "") -> tuple[str, dict[str, Number]]:
    """A difference in words, `+0.055 (+0.012 to +0.098, p = 0.022)`, and its numbers by names that end in `suffix`.

    Means of these trainings have no p. Of listed models and tasks it says how many agree.
    """
    e, runs, blocks = test.estimate, test.run_ids, len(test.scoped.used)
    values = {"difference": e.value, "low": e.low, "high": e.high}
    numbers = {name: number(value, runs, "+.3f") for name, value in values.items()}
    parts = ["{low} to {high}"]
    if not math.isnan(test.p_corrected):
        numbers["p"] = Number(test.p_corrected, _p(test.p_corrected), runs)
        parts.append("{p}")
    if test.scope is Scope.LISTED and blocks > 1:
        numbers |= {name: number(n, runs, ".0f") for name, n in (("agree", test.scoped.agreeing), ("blocks", blocks))}
        parts.append("{agree} of {blocks} agree in sign")
    template = f"{{difference}}{unit} ({', '.join(parts)})"
    fields = {name: f"{{{name}{suffix}}}" for name in numbers}
    return template.format(**fields), {f"{name}{suffix}": value for name, value in numbers.items()}


def holds_for(test: PairedTest) -> tuple[str, dict[str, Number]]:
    """The end of a sentence, which says what its tests hold for, and the numbers in it."""
    scoped, runs = test.scoped, test.run_ids
    models, tasks = (escaped(", ".join(names)) for names in (scoped.models, scoped.tasks))
    template = {
        Scope.TRAININGS: f"over {{pairs}}; {SEEDS_SHOW.get(scoped.seeds)}",
        Scope.LISTED: f"for these models and tasks: {escaped(_listed(scoped.used))}; {{seeds}} seeds, {{pairs}}",
        Scope.TASKS: f"for tasks in general ({{tasks}} of them), with these models: {models}",
        Scope.MODELS: f"for models in general ({{models}} of them), on these tasks: {tasks}",
        Scope.BOTH: "for models and tasks in general ({models} models, {tasks} tasks)",
    }[test.scope]
    counts = {"seeds": scoped.seeds, "models": len(scoped.models), "tasks": len(scoped.tasks)}
    numbers = {name: number(n, runs, ".0f") for name, n in counts.items()}
    numbers["pairs"] = Number(test.cells, f"{test.cells} pair{'s' if test.cells > 1 else ''}", runs)
    return template, {name: found for name, found in numbers.items() if f"{{{name}}}" in template}


def claim_of_tests(
    question: str, about: str, template: str, numbers: Mapping[str, Number], tests: Sequence[PairedTest], named: str
) -> Claim:
    """The claim of tests of one scope. A verdict over all bases is a headline, unless it is of few pairs."""
    scope, enough = tests[0].scope, min(t.cells for t in tests) >= FEWEST_PAIRS
    return Claim(question, about, template, numbers, named, scope, about == ALL_BASES and scope.has_verdict and enough)


def group_by_scope(tests: Iterable[PairedTest]) -> list[list[PairedTest]]:
    """The tests that hold for the same, in their order: one sentence can speak of them."""
    groups: dict[tuple[object, ...], list[PairedTest]] = {}
    for test in tests:
        used = tuple((d.backend, d.model, d.task, len(d.seeds)) for d in test.scoped.used)
        groups.setdefault((test.scope, used), []).append(test)
    return list(groups.values())


FEWEST_PAIRS = 5
"""Of fewer nothing is said in a headline, and each pair is spoken of by itself."""
SEEDS_SHOW = {1: "one seed shows nothing of other trainings", 2: "two seeds show too little of other trainings"}


def _listed(used: Iterable[Differences]) -> str:
    """Models and tasks by name: `a, b on t, u` where each model has the same tasks."""
    tasks: dict[str, list[str]] = {}
    for d in used:
        tasks.setdefault(d.model, []).append(d.task)
    models: dict[tuple[str, ...], list[str]] = {}
    for model, of_model in tasks.items():
        models.setdefault(tuple(dict.fromkeys(of_model)), []).append(model)
    return "; ".join(f"{', '.join(same)} on {', '.join(of_them)}" for of_them, same in models.items())


def estimate_numbers(value: float, low: float, high: float, runs: Iterable[str]) -> dict[str, Number]:
    runs = list(runs)
    return {name: number(v, runs, "+.3f") for name, v in (("difference", value), ("low", low), ("high", high))}


def escaped(text: str) -> str:
    """Text that is no template."""
    return text.replace("{", "{{").replace("}", "}}")


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def headlines(claims: Iterable[Claim]) -> list[str]:
    """A line for each question that is answered in one: by its first headline, which has the largest scope."""
    first: dict[str, str] = {}
    for claim in claims:
        if claim.is_headline:
            first.setdefault(claim.question, f"{claim.question}: {claim.text}")
    return [first[question] for question in QUESTIONS if question in first]


def as_markdown(claims: Iterable[Claim], *notes: str) -> str:
    """The findings as a page: notes on all of them, then for each question that was touched what holds everywhere, and
    each base, with what it rests on."""
    listed = list(claims)
    lines = ["# Findings", *(line for note in notes for line in ("", note))]
    for question, words in QUESTIONS.items():
        same_question = [claim for claim in listed if claim.question == question]
        if same_question:
            lines += ["", f"## {question}: {words}"]
        for about in dict.fromkeys(claim.about for claim in same_question):
            lines += ["", f"**{about}**", ""]
            for claim in (claim for claim in same_question if claim.about == about):
                lines.append(f"- {claim.text}" + (f" *({claim.basis})*" if claim.basis else ""))
    return "\n".join(lines) + "\n"
