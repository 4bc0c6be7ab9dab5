"""The questions of the study answered from the numbers, in words, with no claim that the tests do not carry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.read.imported import Imported
from analysis.stats.claims import (
    FEWEST_PAIRS,
    Claim,
    Number,
    claim_of_tests,
    escaped,
    group_by_scope,
    holds_for,
    measured,
    number,
)
from analysis.stats.comparisons import ALL_BASES, BASE, PairedTest, Points, compare_cells, compare_values, swap_sides
from analysis.stats.schedule_claims import compare_schedules, schedule_claims
from analysis.stats.scopes import Scope
from analysis.stats.sparsity_claims import sparsity_claims
from analysis.stats.statistics import anova, seeds_sentence
from tune_sparse.modes import SPARSE_ADAPTER_MODES

COMPARED = {
    "method": ("RQ2", "Methods"),
    "mode": ("RQ3", "Modes"),
    "backend": ("RQ4", "Backends"),
    "schedule": ("RQ5", "Schedules"),
}
"""{column: (the question that compares its values, their name)}"""


def make_claims(points: Points, imported: Sequence[Imported] = ()) -> tuple[list[Claim], pd.DataFrame]:
    """The claims, and a table of every test behind them."""
    methods, modes = compare_values(points, "method", simultaneous=True), compare_values(points, "mode")
    single = compare_cells(points, "mode", *SPARSE_ADAPTER_MODES)
    backends, schedules = _backend_tests(points), compare_schedules(points)
    claims = [
        *_unfinished_claims(points),
        *sparsity_claims(points, imported),
        *_method_claims(points, methods),
        *_mode_claims(points, modes, single),
        *_backend_claims(points, backends),
        *schedule_claims(points, schedules),
    ]
    by_question = {"RQ2": methods, "RQ3": [*modes, *single], "RQ4": backends, "RQ5": schedules}
    rows = [test.row(question) for question, tests in by_question.items() for test in tests]
    return claims, pd.DataFrame(rows)


def describe_seeds(cells: pd.DataFrame) -> str:
    return seeds_sentence(int(cells.loc[cells["status"] == "done", "seed"].nunique()) or 1)


def _unfinished_claims(points: Points) -> Iterator[Claim]:
    """What is not there, and why what was chosen by its results is not compared."""
    if len(points.missing) and len(points.measured):
        left = points.missing["run_id"].nunique()
        numbers = {"left": number(left, points.measured["run_id"], ".0f")}
        template = "The matrix is unfinished: {left} of its runs were not run, and nothing here speaks for them."
        yield Claim("RQ1", ALL_BASES, template, numbers)
    chosen = points.measured[~points.measured["comparable"].astype(bool)]
    if chosen.empty:
        return
    levels = sorted(points.pruned["sparsity"].unique())
    numbers = {f"level{n}": number(level, points.pruned["run_id"], "g") for n, level in enumerate(levels)}
    numbers["chosen"] = number(len(chosen), chosen["run_id"], ".0f")
    fixed = f"at {', '.join(f'{{level{n}}}' for n in range(len(levels)))} alone, fixed before the first run"
    compared = fixed if levels else "nowhere: no sparsity was fixed before the first run (`--compare-at`)"
    reason = "{chosen} other runs were chosen because of results, or left by a budget, and may favour one side"
    for column, (question, sides) in COMPARED.items():
        if question in ("RQ2", "RQ3") or points.measured[column].nunique() > 1:
            yield Claim(question, ALL_BASES, f"{sides} are compared {compared}; {reason}.", numbers)


# RQ2


def _method_claims(points: Points, tests: Sequence[PairedTest]) -> Iterator[Claim]:
    pruned = points.pruned[points.pruned["accuracy"].notna()]
    if pruned["method"].nunique() < 2:
        return
    overall = list(_best_claims(ALL_BASES, pruned, tests, points.rates))
    yield from overall or [Claim("RQ2", ALL_BASES, "No setting is finished with two methods.")]
    yield from _variance_claim(pruned, points.rates)
    for base, rows in pruned.groupby(BASE, sort=True):
        yield from _best_claims(", ".join(map(str, base)), rows, tests, points.rates)


def _best_claims(about: str, rows: pd.DataFrame, tests: Sequence[PairedTest], rates: str) -> Iterator[Claim]:
    """The method of the highest mean against each of the others, one claim for what the same models and tasks show."""
    settings = rows.groupby([*BASE, "mode", "schedule", "sparsity", "seed"])["method"]
    rows = rows[settings.transform("nunique") == rows["method"].nunique()]
    if rows.empty:
        return
    means = rows.groupby("method")["accuracy"].mean().sort_values(ascending=False)
    best, numbers, parts = str(means.index[0]), dict[str, Number](), list[str]()
    for i, method in enumerate(map(str, means.index)):
        numbers[f"mean{i}"] = number(means[method], rows.loc[rows["method"] == method, "run_id"])
        parts.append(f"{method} {{mean{i}}}")
    for same in group_by_scope(t for t in tests if t.about == about and best in (t.left, t.right)):
        words, found = _best_words(best, same, rates)
        template = f"Mean accuracy over the settings that all have: {', '.join(parts)}. {words}."
        test = f"{same[0].named}; intervals hold together over all pairs of methods (Bonferroni)"
        yield claim_of_tests("RQ2", about, template, numbers | found, same, test)


def _best_words(best: str, tests: Sequence[PairedTest], rates: str) -> tuple[str, dict[str, Number]]:
    """What is shown of the best method against the others; of these trainings, by how much it was better.

    Its mean is over cells. Tests take each model and task alike, and so may find another method the better one.
    """
    beaten, ahead, others = list[str](), list[str](), list[str]()
    where, numbers = holds_for(tests[0])
    for i, test in enumerate(swap_sides(t, best) for t in tests):
        words, found = measured(test, suffix=i)
        numbers |= found
        shown = beaten if test.estimate.value > 0 else ahead
        (shown if test.is_shown else others).append(f"{test.left}: {words}")
    if not tests[0].scope.has_verdict:
        return f"In these trainings, {rates}, {best} minus {' and '.join(others)} {where}", numbers
    parts = [f"{best} is better than {' and '.join(beaten)}"] if beaten else []
    parts += [f"{best} is worse than {' and '.join(ahead)}"] if ahead else []
    parts += [f"no difference can be shown between {best} and {' and '.join(others)}"] if others else []
    return f"{rates.capitalize()}, {', and '.join(parts)}, {where}", numbers


def _variance_claim(pruned: pd.DataFrame, rates: str) -> Iterator[Claim]:
    """How much of the variance of accuracy the method explains, among all that was varied."""
    table = pruned.assign(base=pruned[BASE].agg(", ".join, axis=1))
    complete = table.groupby(["base", "mode", "schedule", "sparsity", "seed"])["method"].transform("nunique")
    table = table[complete == table["method"].nunique()]
    factors = [name for name in ("method", "mode", "schedule", "sparsity", "base") if table[name].nunique() > 1]
    if "method" not in factors or len(table) <= sum(table[name].nunique() for name in factors):
        return
    found, runs = anova(table, "accuracy", factors).set_index("factor"), list(table["run_id"])
    shares = {f"{kind}_{name}": number(float(found[kind][name]), runs) for name in factors for kind in EFFECT_SIZES}
    listed = ", ".join(f"{name} {{eta_squared_{name}}} ({{omega_squared_{name}}})" for name in factors)
    template = f"Shares of the variance {rates}, η² (ω²): {listed}."
    test = "ANOVA, type II, of the cells, which describes these runs"
    yield Claim("RQ2", ALL_BASES, template, shares, test)


EFFECT_SIZES = ("eta_squared", "omega_squared")


# RQ3


def _mode_claims(points: Points, tests: Sequence[PairedTest], single: Sequence[PairedTest]) -> Iterator[Claim]:
    if not single:
        return
    first, second = SPARSE_ADAPTER_MODES
    for test in (swap_sides(t, second) for t in tests if {t.left, t.right} == {first, second}):
        unit = " accuracy" if points.is_accuracy(test.run_ids[0]) else " log-likelihood a token"
        (words, numbers), (where, counts) = measured(test, unit), holds_for(test)
        if not test.scope.has_verdict:
            template = f"In these trainings, {points.rates}, {second} minus {first}: {words} {where}."
        elif test.is_shown:
            better = "better" if test.estimate.value > 0 else "worse"
            template = f"{second.capitalize()} is {better} than {first} {points.rates} by {words}, {where}."
        else:
            template = f"No difference can be shown between {second} and {first} {points.rates}: {words}, {where}."
        yield claim_of_tests("RQ3", test.about, template, numbers | counts, [test], test.named)
    few = len(single) < FEWEST_PAIRS
    yield from _pair_claims(single, points.rates) if few else [_pairs_claim(single, points.rates)]
    yield from _cost_claim(points)


def _pair_claims(single: Sequence[PairedTest], rates: str) -> Iterator[Claim]:
    """A sentence for each of a few pairs: which of these very models differ."""
    for test in single:
        words, numbers = measured(test)
        differ = "these two models differ" if test.differs else "these two models cannot be told apart"
        template = f"{escaped(test.about)}, {rates}: {differ}, {test.right} minus {test.left} {words}."
        yield Claim("RQ3", ALL_BASES, template, numbers, test.named, Scope.TRAININGS)


def _pairs_claim(single: Sequence[PairedTest], rates: str) -> Claim:
    """How many pairs of models differ, each by itself."""
    first, second = SPARSE_ADAPTER_MODES
    turned = [swap_sides(t, second) for t in single]
    won, lost = (sum(t.differs and t.estimate.value * sign > 0 for t in turned) for sign in (1, -1))
    counts = {"won": won, "lost": lost, "all": len(turned), "open": len(turned) - won - lost}
    runs = [run for t in turned for run in t.run_ids]
    template = (
        f"Pair by pair, {rates}: of {{all}} pairs of models {{won}} differ in favour of {second} and {{lost}} of "
        f"{first}; in {{open}} no difference can be shown."
    )
    numbers = {name: number(count, runs, ".0f") for name, count in counts.items()}
    return Claim("RQ3", ALL_BASES, template, numbers, turned[0].named, Scope.TRAININGS)


def _cost_claim(points: Points) -> Iterator[Claim]:
    for backend, rows in points.pruned.groupby("backend", sort=True):
        parts, numbers = [], dict[str, Number]()
        for i, (mode, same) in enumerate(rows.groupby("mode", sort=True)):
            numbers[f"rate{i}"] = number(same["train_examples_per_second"].median(), same["run_id"], ".0f")
            numbers[f"seconds{i}"] = number(same["train_seconds"].median(), same["run_id"], ".2f")
            numbers[f"memory{i}"] = number(same["peak_memory_bytes"].median() / 2**20, same["run_id"], ".0f")
            parts.append(f"{mode} {{rate{i}}} examples a second, {{seconds{i}}} s, {{memory{i}}} MiB at the peak")
        yield Claim("RQ3", f"cost on {backend}", f"Medians of training: {'; '.join(parts)}.", numbers)


# RQ4


def _backend_tests(points: Points) -> list[PairedTest]:
    backends = list(dict.fromkeys(points.pruned["backend"]))
    return [
        test
        for other in backends[1:]
        for test in compare_cells(points, "backend", backends[0], other, within=("model", "task"))
    ]


def _backend_claims(points: Points, tests: Sequence[PairedTest]) -> Iterator[Claim]:
    backends = list(dict.fromkeys(points.pruned["backend"]))
    if len(backends) < 2:
        return
    if not tests:
        yield Claim("RQ4", ALL_BASES, "No cell ran on two backends: their accuracies cannot be compared pair by pair.")
    else:
        runs = [run for t in tests for run in t.run_ids]
        counts = {"differ": sum(t.differs for t in tests), "all": len(tests)}
        numbers = {name: number(count, runs, ".0f") for name, count in counts.items()}
        template = (
            "Of {all} cells that ran on two backends, the two models are shown to differ in accuracy in {differ}."
        )
        test = tests[0].named
        yield Claim("RQ4", ALL_BASES, template, numbers, test, Scope.TRAININGS)
    parts, rates = [], dict[str, Number]()
    for i, (backend, rows) in enumerate(points.pruned.groupby("backend", sort=True)):
        rates[f"rate{i}"] = number(rows["train_examples_per_second"].median(), rows["run_id"], ".0f")
        parts.append(f"{backend} {{rate{i}}}")
    yield Claim("RQ4", ALL_BASES, f"Training examples a second, medians: {', '.join(parts)}.", rates)
