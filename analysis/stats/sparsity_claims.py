"""Claims about sparsity and accuracy: pass marks, how far each curve holds, and where it breaks.

Accuracies are means over seeds; their intervals are over seeds and examples, or over examples for fewer than three
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pandas as pd

from analysis.read.imported import Imported
from analysis.read.seeds import CURVE, shown_columns
from analysis.stats.claims import (
    Claim,
    Number,
    claim_of_tests,
    escaped,
    estimate_numbers,
    group_by_scope,
    holds_for,
    measured,
    number,
)
from analysis.stats.comparisons import ALL_BASES, BASE, OF_DENSE, Points, corrected_tests
from analysis.stats.paired import LEVEL
from analysis.stats.scopes import FEWEST_SEEDS, Scope, Scoped
from analysis.stats.statistics import wilson
from tune_sparse.modes import MODES

PASS_MARKS = (0.02, 0.05, 0.10)
PASS_MARK = PASS_MARKS[-1]
"""Accuracy may fall, perplexity may rise, by this fraction of the dense baseline."""


def sparsity_claims(points: Points, imported: Sequence[Imported]) -> Iterator[Claim]:
    yield from _loss_claims(points, 0.5)
    for (*base, mode), dense in points.dense.groupby([*BASE, "dense_mode"], sort=True):
        if dense["accuracy"].isna().all():
            continue
        about = ", ".join(map(str, base if MODES[str(mode)].has_adapter else (*base, mode)))
        curves = points.measured[(points.measured[BASE] == base).all(axis=1)]
        curves = curves.merge(dense[OF_DENSE], on=OF_DENSE)
        pruned = curves[curves["comparable"].astype(bool)]
        yield from _dense_claims(about, dense, points, [i for i in imported if [i.model, i.task] == base[1:]])
        yield from _half_claim(about, dense, pruned[pruned["sparsity"] == 0.5])
        yield from _most_claim(about, pruned[pruned["sparsity"] == 0.9], points)
        for names, curve in curves.groupby(shown_columns(CURVE, curves), sort=True):
            levels, name = [level for _, level in curve.groupby("sparsity", sort=True)], ", ".join(map(str, names))
            yield _reach_claim(about, name, dense, levels, points)
            yield _break_claim(about, name, dense, levels, points)


def _loss_claims(points: Points, sparsity: float) -> Iterator[Claim]:
    """The accuracy that one sparsity costs over all bases, by method."""
    pairs = points.accuracies(points.to_dense(sparsity))
    compared = [(ALL_BASES, "dense", method, same) for method, same in pairs.groupby("method", sort=True)]
    for tests in group_by_scope(corrected_tests(compared, points)):
        parts, (where, numbers) = list[str](), holds_for(tests[0])
        for i, test in enumerate(tests):
            words, found = measured(test, suffix=i)
            numbers |= found
            undecided = test.scope.has_verdict and not test.is_shown
            parts.append(f"{test.right} {words}{': no difference can be shown' if undecided else ''}")
        numbers["sparsity"] = number(sparsity, tests[0].run_ids, "g")
        start = "At" if tests[0].scope.has_verdict else "In these trainings, at"
        differences = f"accuracy against dense {points.rates}: {'; '.join(parts)}"
        template = f"{start} a sparsity of {{sparsity}}, {differences}; {where}."
        yield claim_of_tests("RQ1", ALL_BASES, template, numbers, tests, tests[0].named)


def _dense_claims(about: str, dense: pd.DataFrame, points: Points, known: Sequence[Imported]) -> Iterator[Claim]:
    """The mark of the dense runs: within 2% of a dense baseline that was measured before."""
    accuracy, scope = float(dense["accuracy"].mean()), _scope_of(dense)
    numbers = {"accuracy": number(accuracy, dense["run_id"])}
    if not known:
        template = (
            "Dense: {accuracy}. No earlier dense result was imported, so the mark of 2% within the dense baseline has "
            "nothing to be measured against (`tune-sparse import`)."
        )
        yield Claim("RQ1", about, template, numbers)
    for baseline in known:
        difference, low, high = _against_imported(accuracy, mean_interval(points, dense), baseline)
        passed = "passes" if accuracy >= 0.98 * baseline.accuracy else "misses"
        carried = "differs from it" if low > 0 or high < 0 else "cannot be told from it"
        known_as = {"imported": number(baseline.accuracy, [baseline.record_id])}
        template = (
            f"Dense: {{accuracy}} {passed} the mark of 2% within the imported baseline {{imported}} "
            f"({escaped(baseline.source)}) and {carried}: {{difference}} ({{low}} to {{high}})."
        )
        against = estimate_numbers(difference, low, high, [*dense["run_id"], baseline.record_id])
        yield Claim("RQ1", about, template, numbers | known_as | against, "interval of Newcombe (1998)", scope)


def _against_imported(accuracy: float, ours: tuple[float, float], baseline: Imported) -> tuple[float, float, float]:
    """Ours minus theirs from the intervals of both, squared and added (Newcombe 1998, method 10); theirs is taken as
    exact where its number of examples is unknown."""
    theirs, count, (low, high) = baseline.accuracy, baseline.n_examples, ours
    known_low, known_high = wilson(theirs * count, count) if count else (theirs, theirs)
    value = accuracy - theirs
    below, above = math.hypot(accuracy - low, known_high - theirs), math.hypot(high - accuracy, theirs - known_low)
    return value, value - below, value + above


def mean_interval(points: Points, runs: pd.DataFrame) -> tuple[float, float]:
    """The interval of the mean accuracy of one setting's seeds: over seeds and examples, or for few seeds Wilson's."""
    if len(runs) < FEWEST_SEEDS:
        examples = int(runs["n_examples"].iloc[0])
        return wilson(runs["accuracy"].mean() * examples, examples)
    e = Scoped(Scope.LISTED, (points.scores(runs),)).estimate()
    return e.low, e.high


def _scope_of(runs: pd.DataFrame) -> Scope:
    return Scope.LISTED if runs["seed"].nunique() >= FEWEST_SEEDS else Scope.TRAININGS


def _half_claim(about: str, dense: pd.DataFrame, half: pd.DataFrame) -> Iterator[Claim]:
    if half.empty:
        return
    runs, means = [*dense["run_id"], *half["run_id"]], half.groupby(CURVE)["accuracy"].mean()
    limits = {name: (1 - mark) * dense["accuracy"].mean() - 1e-9 for name, mark in HALF.items()}
    passes = {name: int((means >= limit).sum()) for name, limit in limits.items()}
    numbers = {name: number(count, runs, ".0f") for name, count in (passes | {"all": len(means)}).items()}
    template = "Half of the weights gone: {ten} of {all} settings are within 10% of dense, {five} within 5%."
    yield Claim("RQ1", about, template, numbers, "means over seeds, untested", Scope.TRAININGS)


HALF = {"five": 0.05, "ten": 0.10}


def _most_claim(about: str, most: pd.DataFrame, points: Points) -> Iterator[Claim]:
    if most.empty:
        return
    level = most[["chance_accuracy", "majority_fraction"]].max(axis=1).max()
    settings = [runs for _, runs in most.groupby(CURVE)]
    above = sum(mean_interval(points, runs)[0] > level for runs in settings)
    counts = {"above": number(above, most["run_id"], ".0f"), "all": number(len(settings), most["run_id"], ".0f")}
    template = (
        "Nine tenths gone: {above} of {all} settings are above chance and the largest class ({level}), with their "
        "whole interval."
    )
    scope = _least_scope(settings)
    test = "over seeds and examples" if scope is Scope.LISTED else "Wilson"
    yield Claim("RQ1", about, template, counts | {"level": number(level, most["run_id"])}, f"intervals: {test}", scope)


def _reach_claim(
    about: str, curve_name: str, dense: pd.DataFrame, levels: Sequence[pd.DataFrame], points: Points
) -> Claim:
    """The largest sparsity within each mark of dense: by the mean accuracies, and as far as the intervals show it."""
    runs = [*dense["run_id"], *(run for level in levels for run in level["run_id"])]
    falls = [fall.estimate for level in levels if (fall := points.difference(dense, level))]
    reference = dense["accuracy"].mean()
    parts, numbers = list[str](), dict[str, Number]()
    for mark in PASS_MARKS:
        name, allowed = f"{mark:.0%}"[:-1], -mark * reference - 1e-9
        within = [e.value >= allowed for e in falls]
        shown = [e.value >= allowed and e.low >= allowed for e in falls]
        for kind, passed in (("reach", within), ("shown", shown)):
            first_miss = passed.index(False) if False in passed else len(levels)
            last = levels[first_miss - 1]["sparsity"].iloc[0] if first_miss else 0.0
            numbers[f"{kind}{name}"] = number(last, runs, "g")
        parts.append(f"{mark:.0%} up to {{reach{name}}} (shown up to {{shown{name}}})")
    run = ""
    if is_unfinished(points, levels[0]):
        numbers |= {f"level{n}": number(s["sparsity"].iloc[0], s["run_id"], "g") for n, s in enumerate(levels)}
        run = f"; only {', '.join(f'{{level{n}}}' for n in range(len(levels)))} were run"
    template = f"{escaped(curve_name)}: within {', '.join(parts)} of dense{run}."
    test = "shown: paired intervals against dense, in the order of sparsity"
    return Claim("RQ1", about, template, numbers, test, _least_scope([dense, *levels]))


def is_unfinished(points: Points, level: pd.DataFrame) -> bool:
    """Whether cells of the curve of a level were not run."""
    names = [*BASE, *CURVE]
    return bool((points.missing[names] == level[names].iloc[0]).all(axis=1).any())


def _break_claim(
    about: str, curve_name: str, dense: pd.DataFrame, levels: Sequence[pd.DataFrame], points: Points
) -> Claim:
    """The largest fall from one sparsity to the next among those that are more than noise. The intervals of all steps
    hold together, so that the one that is picked for its fall does."""
    steps, scope = list(pairwise([dense, *levels])), _least_scope([dense, *levels])
    level = 1 - (1 - LEVEL) / len(steps)
    found = [(fall, step) for step in steps if (fall := points.difference(*step, level))]
    shown = [pair for pair in found if pair[0].estimate.high < 0]
    fall, (before, after) = min(shown or found, key=lambda pair: pair[0].estimate.value)
    e, test = fall.estimate, f"{fall.estimate.test}; intervals of all {len(steps)} steps hold together (Bonferroni)"
    if not shown:
        return Claim("RQ1", about, f"{escaped(curve_name)}: no single step of sparsity shows a fall.", {}, test, scope)
    numbers = estimate_numbers(e.value, e.low, e.high, fall.run_ids)
    numbers["from"], numbers["to"] = (number(s["sparsity"].iloc[0], s["run_id"], "g") for s in (before, after))
    numbers["before"], numbers["after"] = (number(s["accuracy"].mean(), s["run_id"]) for s in (before, after))
    breaks = "breaks" if scope.has_verdict else "in these trainings breaks"
    template = (
        f"{escaped(curve_name)}: {breaks} between {{from}} and {{to}}, the largest fall that is shown, from "
        "{before} to {after} ({difference}, {low} to {high})."
    )
    return Claim("RQ1", about, template, numbers, test, scope)


def _least_scope(levels: Sequence[pd.DataFrame]) -> Scope:
    """What all of these levels can speak for."""
    return Scope.LISTED if all(_scope_of(level) is Scope.LISTED for level in levels) else Scope.TRAININGS
