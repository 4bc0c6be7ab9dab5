"""The HTML page of a report: one file that needs no network, in which every number leads to its runs.

A link `#trace=N` shows the cells behind a number in the table; the name of a run there opens its record.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.audit.audit import RULES, Audit, AuditFinding
from analysis.baselines.comparison import PublishedComparison, summary_sentence
from analysis.baselines.published import our_metric
from analysis.read.chosen import rates_words
from analysis.read.seeds import CURVE, calibration_words, over_seeds, primary_words, shown_columns, spread_words
from analysis.report.rounding import UNKNOWN, rounded, with_interval
from analysis.report.runs import relative_link
from analysis.stats.claims import QUESTIONS, Claim
from analysis.stats.comparisons import BASE
from analysis.stats.sparsity_claims import PASS_MARK
from tune_sparse.modes import MODES, dense_mode

TEMPLATES = Path(__file__).parent / "templates"
DIGITS = 6
"""Significant ones of a number in the page's table; result.json has them all."""
FINDINGS_A_RULE = 12
"""More findings of one audit rule are counted, not listed."""


@dataclass(frozen=True)
class RenderedClaim:
    """A finding: what it is about, its words and numbers in order, each number with its runs, and what it rests on."""

    question: str
    about: str
    parts: Sequence[tuple[str, tuple[str, ...]]]
    basis: str = ""


def render_claim(claim: Claim) -> RenderedClaim:
    """A claim with its numbers set apart."""
    parts: list[tuple[str, tuple[str, ...]]] = []
    for words, name, _, _ in Formatter().parse(claim.template):
        parts.append((words, ()))
        if name is not None:
            parts.append((claim.numbers[name].shown, claim.numbers[name].run_ids))
    return RenderedClaim(claim.question, claim.about, parts, claim.basis)


class Traces:
    """The cells behind each number of the page, once where several numbers have the same."""

    def __init__(self, cells: pd.DataFrame) -> None:
        self._cells_by_run: dict[str, list[int]] = defaultdict(list)
        for place, run_id in enumerate(cells["run_id"]):
            self._cells_by_run[run_id].append(place)
        self._known: dict[tuple[int, ...], int] = {}

    def trace_number(self, run_ids: Iterable[str]) -> int:
        """The number that `#trace=` takes for these runs."""
        places = sorted({place for run_id in run_ids for place in self._cells_by_run.get(run_id, ())})
        return self._known.setdefault(tuple(places), len(self._known))

    def as_ranges(self) -> list[list[int]]:
        """For each trace first, last, first, last, ... of its stretches of cells."""
        traces = []
        for places in self._known:
            ends: list[int] = []
            for place in places:
                if ends and ends[-1] == place - 1:
                    ends[-1] = place
                else:
                    ends += [place, place]
            traces.append(ends)
        return traces


@dataclass(frozen=True)
class AuditSummary:
    """The audit's result, for the top of the page."""

    state: str
    """sound, warning or error"""
    summary: str
    groups: Sequence[Mapping[str, Any]]
    """rule, severity, meaning, findings, and how many more there are"""


def summarise_audit(found: Audit) -> AuditSummary:
    by_rule: dict[str, list[AuditFinding]] = defaultdict(list)
    for finding in found.findings:
        by_rule[finding.rule].append(finding)
    groups = [
        {
            "rule": rule,
            "severity": RULES[rule].severity,
            "meaning": RULES[rule].meaning,
            "findings": findings[:FINDINGS_A_RULE],
            "more": max(0, len(findings) - FINDINGS_A_RULE),
        }
        for rule, findings in by_rule.items()
    ]
    state = "error" if found.errors else "warning" if groups else "sound"
    return AuditSummary(state, found.summary(), groups)


@dataclass(frozen=True)
class Content:
    """Everything that the page shows."""

    counts: str
    cells: pd.DataFrame
    """the summary"""
    folders: Sequence[Path]
    """of results, the first the page's own"""
    audit: AuditSummary
    findings: Sequence[RenderedClaim]
    seeds: str
    """what can be said with so many seeds"""
    passing: pd.DataFrame
    """as `highest_passing_sparsity`"""
    choices: Sequence[str] = ()
    """how settings were chosen where a sweep had axes"""
    comparisons: Sequence[PublishedComparison] = ()
    hardware: Sequence[Mapping[str, Any]] = ()
    published_rates: Sequence[Mapping[str, str]] = ()
    """of a CS-3, by others"""
    dynamics: Sequence[Mapping[str, Any]] = ()
    """a row for each run that recorded what became of its masks"""
    figures: Mapping[str, str] = field(default_factory=dict)
    """{name: caption} of the PNG files beside the page"""


def render_page(content: Content, path: Path) -> str:
    """The page that will be written at `path`; its links to files are relative to that."""
    traces, averaged = Traces(content.cells), over_seeds(content.cells)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    columns, rows = _passing(content)
    return environment.get_template("page.html").render(
        trace=traces.trace_number,
        title="tune-sparse: how sparse, and still good?",
        counts=content.counts,
        audit=content.audit,
        questions=_by_question(content.findings),
        seeds=content.seeds,
        choices=content.choices,
        passing=rows,
        passing_columns=columns,
        pass_mark=f"{PASS_MARK:.0%}",
        captions=_captions(averaged, rates_words(content.cells)),
        spread=spread_words(averaged["seeds_done"]),
        published=_published(content.comparisons, rates_words(content.cells)),
        hardware=content.hardware,
        published_rates=content.published_rates,
        dynamics=content.dynamics,
        figures=[_figure(path.parent, name, caption) for name, caption in content.figures.items()],
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text("utf-8")),
        data=lambda: inline_json(_data(content, path) | {"traces": traces.as_ranges()}),
    )


def _by_question(findings: Sequence[RenderedClaim]) -> list[tuple[str, list[tuple[str, list[RenderedClaim]]]]]:
    """Each question with what was found, by what it is about; what holds everywhere comes first, as the claims do."""
    listed: dict[str, dict[str, list[RenderedClaim]]] = {}
    for finding in findings:
        listed.setdefault(finding.question, {}).setdefault(finding.about, []).append(finding)
    return [(f"{question}: {QUESTIONS[question]}", list(abouts.items())) for question, abouts in listed.items()]


def inline_json(value: Any) -> Markup:
    """JSON within a script element, which only `<` could end."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _figure(folder: Path, name: str, caption: str) -> dict[str, str]:
    image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    return {"name": name, "caption": caption, "image": image}


def _data(content: Content, path: Path) -> dict[str, Any]:
    """The summary by column: texts as numbers of a word list, since most repeat; a run named as its cell is null."""
    cells = content.cells.drop(columns=["candidates", "chosen", "choice"])
    present = [{entry.name for entry in (folder / "runs").glob("*")} for folder in content.folders]
    cells["root"] = [next((i for i, names in enumerate(present) if run in names), None) for run in cells["run_id"]]
    cells["run_id"] = cells["run_id"].where(cells["run_id"] != cells["cell_id"])
    return {
        "count": len(cells),
        "roots": [relative_link(folder / "runs", path) for folder in content.folders],
        "columns": {str(name): _column(cells[name]) for name in cells if cells[name].notna().any() or name == "run_id"},
    }


def _column(values: pd.Series[Any]) -> dict[str, Any]:
    if values.name == "root":
        return {"values": [None if pd.isna(value) else int(value) for value in values]}
    if pd.api.types.is_numeric_dtype(values):
        return {"values": [None if pd.isna(value) else _short(float(value)) for value in values]}
    words = {word: i for i, word in enumerate(dict.fromkeys(values.dropna()))}
    return {"values": [None if pd.isna(value) else words[value] for value in values], "words": list(map(str, words))}


def _short(value: float) -> float | int:
    number = float(f"{value:.{DIGITS}g}")
    return int(number) if number.is_integer() else number


def _passing(content: Content) -> tuple[list[str], list[dict[str, Any]]]:
    """The headings and lines of the table of highest passing sparsities, each number with its runs."""
    table = content.passing
    if table.empty:
        return [], []
    several = table["backend"].nunique() > 1
    names = list(table[shown_columns(CURVE, table)].drop_duplicates().itertuples(index=False, name=None))
    done = content.cells[content.cells["status"] == "done"]
    keys = ["backend", "model", "task", *shown_columns(CURVE, table), "sparsity"]
    runs = {key: tuple(dict.fromkeys(ids)) for key, ids in done.groupby(keys)["run_id"]}
    lines = []
    for (backend, model, task, mode), rows in table.groupby([*BASE, "dense_mode"], sort=False):
        known = rows.set_index(shown_columns(CURVE, table))["highest_sparsity"].to_dict()
        cells = []
        for name in names:
            highest = known.get(name)
            ids = runs.get((backend, model, task, *name, highest), ()) if pd.notna(highest) else ()
            cells.append({"text": f"{highest:g}" if pd.notna(highest) else UNKNOWN, "run_ids": ids})
        first = rows.iloc[0]
        dense = done[(done["backend"] == backend) & (done["model"] == model) & (done["task"] == task)]
        dense = dense[(dense["sparsity"] == 0) & (dense["mode"].map(dense_mode) == mode)]
        parts = (model, backend if several else "", "" if MODES[str(mode)].has_adapter else mode)
        lines.append(
            {
                "model": ", ".join(str(part) for part in parts if part),
                "task": task,
                "metric": first["metric"],
                "dense": rounded(first["dense"], first["dense_spread"]),
                "dense_runs": tuple(dict.fromkeys(dense["run_id"])),
                "cells": cells,
            }
        )
    return [", ".join(name) for name in names], lines


def _captions(table: pd.DataFrame, rates: str) -> str:
    """Say what holds of every curve and table: the primary metrics, the learning rates, the calibration."""
    primary, calibrated = primary_words(table), calibration_words(table)
    sentences = [f"Primary metrics: {primary}." if primary else "", f"All {rates}."]
    return " ".join(filter(None, [*sentences, f"Calibrated on: {calibrated}." if calibrated else ""]))


def _published(comparisons: Sequence[PublishedComparison], rates: str) -> dict[str, Any]:
    rows = [(comparison, published_row(comparison)) for comparison in comparisons]
    return {
        "summary": summary_sentence(comparisons, rates),
        "compared": [row for comparison, row in rows if comparison.reason is None],
        "others": [row for comparison, row in rows if comparison.reason is not None],
    }


def published_row(comparison: PublishedComparison) -> dict[str, Any]:
    """A comparison in words and rounded numbers; each published number as its source prints it."""
    published = comparison.published
    low, high = comparison.low, comparison.high
    stderr = (high - low) / 4 if high is not None and low is not None else None
    return {
        "source": published.source,
        "address": published.address,
        "kind": published.kind if published.value is not None else "not entered",
        "model": published.model,
        "task": published.task or UNKNOWN,
        "method": " + ".join(dict.fromkeys(filter(None, (published.method, published.tuning)))) or UNKNOWN,
        "sparsity": UNKNOWN if published.sparsity is None else f"{published.sparsity:g}",
        "metric": our_metric(published).replace("_", " "),
        "theirs": UNKNOWN if published.value is None else f"{published.value:.6g}",
        "ours": rounded(comparison.value, stderr),
        "difference": with_interval(comparison.difference, low, high),
        "our_setting": comparison.described if comparison.our_setting else "",
        "verdict": comparison.verdict,
        "reason": comparison.reason or "",
        "run_ids": comparison.run_ids,
    }
