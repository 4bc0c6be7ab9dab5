"""The four questions of the study answered from the numbers, in words, with no claim that the tests do not carry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.read.imported import Imported
from analysis.stats.claims import Claim, Number, escaped, interval, number
from analysis.stats.comparisons import ALL_BASES, BASE, PairedTest, Points, compare_cells, compare_values, swap_sides
from analysis.stats.sparsity_claims import sparsity_claims
from analysis.stats.statistics import anova, repeated_measures, seeds_sentence
from tune_sparse.modes import SPARSE_ADAPTER_MODES

MEASURED = "{{difference}} {unit} ({{low}} to {{high}}, {{p}}, {{cells}} pairs of cells)"


def make_claims(points: Points, imported: Sequence[Imported] = ()) -> tuple[list[Claim], pd.DataFrame]:
    """The claims, and a table of every test behind them."""
    methods, modes = compare_values(points, "method"), compare_values(points, "mode")
    single = compare_cells(points, "mode", *SPARSE_ADAPTER_MODES)
    backends = _backend_tests(points)
    claims = [
        *sparsity_claims(points, imported),
        *_method_claims(points, methods),
        *_mode_claims(points, modes, single),
        *_backend_claims(points, backends),
    ]
    by_question = {"RQ2": methods, "RQ3": [*modes, *single], "RQ4": backends}
    rows = [test.row(question) for question, tests in by_question.items() for test in tests]
    return claims, pd.DataFrame(rows)


def describe_seeds(cells: pd.DataFrame) -> str:
    return seeds_sentence(int(cells.loc[cells["status"] == "done", "seed"].nunique()) or 1)


# RQ2


def _method_claims(points: Points, tests: Sequence[PairedTest]) -> Iterator[Claim]:
    pruned = points.pruned[points.pruned["accuracy"].notna()]
    if pruned["method"].nunique() < 2:
        yield Claim("RQ2", ALL_BASES, "One method only: there is nothing to compare.")
        return
    yield _best_claim(ALL_BASES, pruned, [t for t in tests if t.about == ALL_BASES and not t.warning])
    yield from _variance_claim(pruned)
    for base, rows in pruned.groupby(BASE, sort=True):
        about = ", ".join(map(str, base))
        yield _best_claim(about, rows, [t for t in tests if t.about == about])


def _best_claim(about: str, rows: pd.DataFrame, tests: Sequence[PairedTest]) -> Claim:
    """The method of the highest mean, and which of the others it is shown to be better than."""
    settings = rows.groupby([*BASE, "mode", "sparsity", "seed"])["method"]
    rows = rows[settings.transform("nunique") == rows["method"].nunique()]
    if rows.empty:
        return Claim("RQ2", about, "No setting is finished with every method: there is nothing to compare.")
    means = rows.groupby("method")["accuracy"].mean().sort_values(ascending=False)
    best, numbers, parts = str(means.index[0]), dict[str, Number](), list[str]()
    for i, method in enumerate(map(str, means.index)):
        numbers[f"mean{i}"] = number(means[method], rows.loc[rows["method"] == method, "run_id"])
        parts.append(f"{method} {{mean{i}}}")
    beaten, others = list[str](), list[str]()
    for i, test in enumerate(swap_sides(t, best) for t in tests if best in (t.left, t.right)):
        numbers |= {f"{name}{i}": value for name, value in interval(test).items()}
        words = f"{test.left}: {{difference{i}}} ({{low{i}}} to {{high{i}}}, {{p{i}}})"
        (beaten if test.is_shown and test.estimate.value > 0 else others).append(words)
    template = f"Mean accuracy over the settings that all have: {', '.join(parts)}."
    if beaten:
        template += f" {best} is better than {' and '.join(beaten)}."
    if others:
        template += f" No difference can be shown between {best} and {' and '.join(others)}."
    return Claim("RQ2", about, template, numbers, f"{tests[0].estimate.test}, Holm" if tests else None)


def _variance_claim(pruned: pd.DataFrame) -> Iterator[Claim]:
    """How much of the variance of accuracy the method explains, among all that was varied."""
    table = pruned.assign(base=pruned[BASE].agg(", ".join, axis=1))
    complete = table.groupby(["base", "mode", "sparsity", "seed"])["method"].transform("nunique")
    table = table[complete == table["method"].nunique()]
    factors = [name for name in ("method", "mode", "sparsity", "base") if table[name].nunique() > 1]
    if "method" not in factors or len(table) <= sum(table[name].nunique() for name in factors):
        return
    found, runs = anova(table, "accuracy", factors).set_index("factor"), list(table["run_id"])
    shares = {f"{kind}_{name}": number(float(found[kind][name]), runs) for name in factors for kind in EFFECT_SIZES}
    listed = ", ".join(f"{name} {{eta_squared_{name}}} ({{omega_squared_{name}}})" for name in factors)
    template = f"Shares of the variance, η² (ω²): {listed}."
    test = "ANOVA, type II, of the cells; its own p would take cells for independent"
    if table["base"].nunique() > 1:
        f, df, df_error, p = repeated_measures(table, "accuracy", "base", "method")
        values = {"f": (f, ".1f"), "df": (df, "g"), "df_error": (df_error, "g"), "p": (p, ".2g")}
        shares |= {name: number(value, runs, form) for name, (value, form) in values.items()}
        template += " Method against its variation between bases: F({df}, {df_error}) = {f}, p = {p}."
        test += "; F by repeated measures, optimistic where bases share examples: no claim rests on it"
    yield Claim("RQ2", ALL_BASES, template, shares, test)


EFFECT_SIZES = ("eta_squared", "omega_squared")


# RQ3


def _mode_claims(points: Points, tests: Sequence[PairedTest], single: Sequence[PairedTest]) -> Iterator[Claim]:
    between_modes = [t for t in tests if {t.left, t.right} == set(SPARSE_ADAPTER_MODES) and not t.warning]
    if not between_modes:
        yield Claim("RQ3", ALL_BASES, "No two cells differ in these modes alone: there is nothing to compare.")
    for test in (swap_sides(t, SPARSE_ADAPTER_MODES[1]) for t in between_modes):
        unit = "accuracy" if points.is_accuracy(test.run_ids[0]) else "log-likelihood a token"
        measured = MEASURED.format(unit=unit)
        if test.is_shown:
            better = "better" if test.estimate.value > 0 else "worse"
            template = f"Sparse-to-sparse is {better} than sparse-to-dense by {measured}."
        else:
            template = f"No difference can be shown between the modes: {measured}."
        yield Claim("RQ3", test.about, template, interval(test), f"{test.estimate.test}, Holm")
    if single:
        runs = [run for t in single for run in t.run_ids]
        won = [t for t in single if t.is_shown and t.estimate.value > 0]
        lost = [t for t in single if t.is_shown and t.estimate.value < 0]
        counts = {"won": len(won), "lost": len(lost), "all": len(single), "open": len(single) - len(won) - len(lost)}
        template = (
            "Cell by cell, of {all} pairs of models sparse-to-sparse is better in {won} and worse in {lost}; in {open} "
            "no difference can be shown."
        )
        numbers = {name: number(count, runs, ".0f") for name, count in counts.items()}
        yield Claim("RQ3", ALL_BASES, template, numbers, f"{single[0].estimate.test}, Holm")
    yield from _cost_claim(points)


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
        name = backends[0] if backends else "none"
        hardware = ", ".join(sorted(map(str, points.pruned["hardware"].dropna().unique()))) or "no hardware"
        text = f"One backend only ({name}, on {hardware}): nothing can be said of the CS-3 against GPUs."
        yield Claim("RQ4", ALL_BASES, escaped(text))
        return
    if not tests:
        yield Claim("RQ4", ALL_BASES, "No cell ran on two backends: their accuracies cannot be compared pair by pair.")
    else:
        runs = [run for t in tests for run in t.run_ids]
        counts = {"differ": sum(t.is_shown for t in tests), "all": len(tests)}
        numbers = {name: number(count, runs, ".0f") for name, count in counts.items()}
        template = "Of {all} cells that ran on two backends, {differ} are shown to differ in accuracy."
        yield Claim("RQ4", ALL_BASES, template, numbers, f"{tests[0].estimate.test}, Holm")
    parts, rates = [], dict[str, Number]()
    for i, (backend, rows) in enumerate(points.pruned.groupby("backend", sort=True)):
        rates[f"rate{i}"] = number(rows["train_examples_per_second"].median(), rows["run_id"], ".0f")
        parts.append(f"{backend} {{rate{i}}}")
    yield Claim("RQ4", ALL_BASES, f"Training examples a second, medians: {', '.join(parts)}.", rates)
