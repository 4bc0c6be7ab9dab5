"""Claims about sparsity and accuracy: pass marks, how far each curve holds, and where it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from analysis.read.imported import Imported
from analysis.stats.claims import Claim, Number, escaped, estimate_numbers, interval, number
from analysis.stats.comparisons import ALL_BASES, BASE, Points, corrected_tests, count_bases, difference_between_runs
from analysis.stats.statistics import against_published, holm, wilson

PASS_MARKS = (0.02, 0.05, 0.10)
PASS_MARK = PASS_MARKS[-1]
"""Accuracy may fall, perplexity may rise, by this fraction of the dense baseline."""


def sparsity_claims(points: Points, imported: Sequence[Imported]) -> Iterator[Claim]:
    yield from _loss_claims(points, 0.5)
    for base, dense in points.dense.groupby(BASE, sort=True):
        if dense["accuracy"].isna().all():
            continue
        about, row = ", ".join(map(str, base)), dense.iloc[0]
        pruned = points.pruned[(points.pruned[BASE] == list(base)).all(axis=1)]
        pruned = pruned[pruned["seed"] == row["seed"]]
        yield from _dense_claims(about, row, [i for i in imported if (i.model, i.task) == base[1:]])
        yield from _half_claim(about, row, pruned[pruned["sparsity"] == 0.5])
        yield from _most_claim(about, pruned[pruned["sparsity"] == 0.9])
        for (method, mode), curve in pruned.groupby(["method", "mode"], sort=True):
            curve = curve.sort_values("sparsity")
            yield _reach_claim(about, f"{method}, {mode}", row, curve, points)
            yield _break_claim(about, f"{method}, {mode}", row, curve, points)


def _loss_claims(points: Points, sparsity: float) -> Iterator[Claim]:
    """The accuracy that one sparsity costs over all bases, by method."""
    pairs = points.accuracies(points.to_dense(sparsity))
    compared = [(ALL_BASES, "dense", method, same) for method, same in pairs.groupby("method", sort=True)]
    tests = corrected_tests([c for c in compared if count_bases(c[3]) > 1], points.over_bases)
    if not tests:
        return
    parts, numbers = [], {"sparsity": number(sparsity, pairs["run_id_right"], "g")}
    for i, test in enumerate(tests):
        numbers |= {f"{name}{i}": value for name, value in interval(test).items()}
        words = "" if test.is_shown else ", no difference can be shown"
        parts.append(f"{test.right} {{difference{i}}} ({{low{i}}} to {{high{i}}}, {{p{i}}}{words})")
    template = f"At a sparsity of {{sparsity}}, accuracy against dense: {'; '.join(parts)}."
    yield Claim("RQ1", ALL_BASES, template, numbers, f"{tests[0].estimate.test}, Holm")


def _dense_claims(about: str, dense: pd.Series[Any], known: Sequence[Imported]) -> Iterator[Claim]:
    """The mark of the dense run: within 2% of a dense baseline that was measured before."""
    numbers = {"accuracy": number(dense["accuracy"], [dense["run_id"]])}
    if not known:
        template = (
            "Dense: {accuracy}. No earlier dense result was imported, so the mark of 2% within the dense baseline has "
            "nothing to be measured against (`tune-sparse import`)."
        )
        yield Claim("RQ1", about, template, numbers)
    for baseline in known:
        e = against_published(dense["accuracy"], int(dense["n_examples"]), baseline.accuracy, baseline.n_examples)
        passed = "passes" if dense["accuracy"] >= 0.98 * baseline.accuracy else "misses"
        carried = "differs from it" if e.is_shown else "cannot be told from it"
        runs = [dense["run_id"], baseline.record_id]
        known_as = {"imported": number(baseline.accuracy, [baseline.record_id])}
        template = (
            f"Dense: {{accuracy}} {passed} the mark of 2% within the imported baseline {{imported}} "
            f"({escaped(baseline.source)}) and {carried}: {{difference}} ({{low}} to {{high}})."
        )
        against = estimate_numbers(e.value, e.low, e.high, runs)
        yield Claim("RQ1", about, template, numbers | known_as | against, e.test)


def _half_claim(about: str, dense: pd.Series[Any], half: pd.DataFrame) -> Iterator[Claim]:
    if half.empty:
        return
    runs = [dense["run_id"], *half["run_id"]]
    passes = {name: (half["accuracy"] >= (1 - mark) * dense["accuracy"] - 1e-9).sum() for name, mark in HALF.items()}
    numbers = {name: number(count, runs, ".0f") for name, count in (passes | {"all": len(half)}).items()}
    template = "Half of the weights gone: {ten} of {all} runs are within 10% of dense, {five} within 5%."
    yield Claim("RQ1", about, template, numbers)


HALF = {"five": 0.05, "ten": 0.10}


def _most_claim(about: str, most: pd.DataFrame) -> Iterator[Claim]:
    if most.empty:
        return
    level = most[["chance_accuracy", "majority_fraction"]].max(axis=1)
    correct = most["accuracy"] * most["n_examples"]
    lows = [wilson(k, int(n))[0] for k, n in zip(correct, most["n_examples"], strict=True)]
    above = int((np.array(lows) > level).sum())
    counts = {"above": number(above, most["run_id"], ".0f"), "all": number(len(most), most["run_id"], ".0f")}
    template = (
        "Nine tenths gone: {above} of {all} runs are above chance and the largest class ({level}), with their whole "
        "interval."
    )
    yield Claim("RQ1", about, template, counts | {"level": number(level.max(), most["run_id"])}, "Wilson intervals")


def _reach_claim(about: str, curve_name: str, dense: pd.Series[Any], curve: pd.DataFrame, points: Points) -> Claim:
    """The largest sparsity within each mark of dense: by the accuracies, and as far as the examples show it."""
    lows = [difference_between_runs(points.predictions, dense["run_id"], run).low for run in curve["run_id"]]
    parts, numbers = [], dict[str, Number]()
    for mark in PASS_MARKS:
        limit, name = (1 - mark) * dense["accuracy"] - 1e-9, f"{mark:.0%}"[:-1]
        within = (curve["accuracy"] >= limit).cummin()
        shown = (within & (pd.Series(lows, index=curve.index) >= -mark * dense["accuracy"])).cummin()
        for kind, passed in (("reach", within), ("shown", shown)):
            last = curve[passed]["sparsity"].max() if passed.any() else 0.0
            numbers[f"{kind}{name}"] = number(last, [dense["run_id"], *curve["run_id"]], "g")
        parts.append(f"{mark:.0%} up to {{reach{name}}} (shown up to {{shown{name}}})")
    template = f"{curve_name}: within {', '.join(parts)} of dense."
    return Claim("RQ1", about, template, numbers, "shown: paired intervals against dense, in the order of sparsity")


def _break_claim(about: str, curve_name: str, dense: pd.Series[Any], curve: pd.DataFrame, points: Points) -> Claim:
    """The step of sparsity that costs most, if that fall is more than noise."""
    steps = list(pairwise([dense, *(row for _, row in curve.iterrows())]))
    if not steps:
        return Claim("RQ1", about, f"{curve_name}: no finished run above sparsity zero.")
    found = [difference_between_runs(points.predictions, a["run_id"], b["run_id"]) for a, b in steps]
    corrected = holm([e.p for e in found])
    worst = min(range(len(steps)), key=lambda i: found[i].value)
    (before, after), e = steps[worst], found[worst]
    runs = [before["run_id"], after["run_id"]]
    if corrected[worst] >= 0.05 or e.value >= 0:
        return Claim("RQ1", about, f"{curve_name}: no single step of sparsity shows a fall.", {}, e.test)
    numbers = estimate_numbers(e.value, e.low, e.high, runs)
    numbers["from"], numbers["to"] = (number(row["sparsity"], [row["run_id"]], "g") for row in (before, after))
    numbers["before"], numbers["after"] = (number(row["accuracy"], [row["run_id"]]) for row in (before, after))
    template = (
        f"{curve_name}: breaks between {{from}} and {{to}}, where accuracy falls most, from {{before}} to {{after}} "
        "({difference}, {low} to {high})."
    )
    return Claim("RQ1", about, template, numbers, f"{e.test}, corrected over the steps of the curve")
