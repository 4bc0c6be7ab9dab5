"""Pairs of cells that differ in one thing alone, and the tests of their differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.read.chosen import rates_words
from analysis.read.results import Predictions
from analysis.read.seeds import shown_columns
from analysis.stats.crossed import Floats, over_columns
from analysis.stats.paired import LEVEL
from analysis.stats.scopes import FEWEST_SEEDS, Differences, Scope, Scoped, find_scopes, t_estimate
from analysis.stats.statistics import Estimate, holm, paired_difference
from tune_sparse.modes import dense_mode
from tune_sparse.pruning.methods import METHODS

BASE = ["backend", "model", "task"]
"""A base model on a task, from which cells grow."""
SETTING = ["method", "mode", "schedule", "sparsity"]
AXES = [*SETTING, "seed", "protocol_id"]
OF_DENSE = ["dense_mode", "seed", "protocol_id"]
"""What a cell shares with its dense run, besides its base."""
ALL_BASES = "all models and tasks of these results"


@dataclass(frozen=True)
class PairedTest:
    """One comparison: `right` minus `left`, over the cells that differ in nothing else."""

    about: str
    left: str
    right: str
    cells: int
    scoped: Scoped
    estimate: Estimate
    p_corrected: float
    """by Holm, over the comparisons of one scope that answer the same question"""
    run_ids: tuple[str, ...]

    @property
    def scope(self) -> Scope:
        return self.scoped.scope

    @property
    def named(self) -> str:
        """The test, and how its p is corrected where it has one."""
        return self.estimate.test if math.isnan(self.p_corrected) else f"{self.estimate.test}, Holm"

    @property
    def differs(self) -> bool:
        return self.p_corrected < 1 - LEVEL

    @property
    def is_shown(self) -> bool:
        """Whether one side may be called the better one."""
        return self.scope.has_verdict and self.differs

    def row(self, question: str) -> dict[str, Any]:
        e = self.estimate
        return {
            "question": question,
            "about": self.about,
            "scope": self.scope.value,
            "left": self.left,
            "right": self.right,
            "cells": self.cells,
            "difference": e.value,
            "low": e.low,
            "high": e.high,
            "p": e.p,
            "p_corrected": self.p_corrected,
            "test": e.test,
            "run_ids": " ".join(self.run_ids),
        }


def swap_sides(test: PairedTest, right: str) -> PairedTest:
    """The same comparison with `right` on the right."""
    if test.right == right:
        return test
    e = test.estimate
    return replace(test, left=test.right, right=right, estimate=replace(e, value=-e.value, low=-e.high, high=-e.low))


class Points:
    """Finished cells above sparsity 0, each with what its model answered.

    Only `comparable` ones are `pruned`, which may enter means and comparisons; `measured` has those too that were run
    because of other results. Cells at sparsity 0 share their runs and are the baseline of curves, `dense`: of those
    whose `dense_mode` is theirs. Of runs that answered other questions than most of their model and task, nothing is
    compared: the audit calls them mixed.
    """

    def __init__(self, cells: pd.DataFrame, predictions: Mapping[str, Predictions]) -> None:
        done = cells[(cells["status"] == "done") & cells["run_id"].isin(list(predictions))]
        questions = done["run_id"].map(lambda run: hash(tuple(predictions[run].ids)))
        usual = questions.groupby([done["model"], done["task"]]).transform(lambda same: same.mode()[0])
        done = done[questions == usual].assign(dense_mode=done["mode"].map(dense_mode))
        self.measured = done[done["sparsity"] > 0].drop_duplicates("run_id")
        self.pruned = self.measured[self.measured["comparable"].astype(bool)]
        self.missing = cells[cells["status"].isin(["missing", "interrupted"])]
        self.dense = done[done["sparsity"] == 0].drop_duplicates("run_id")
        self.predictions = predictions
        self.rates = rates_words(cells)

    def pairs(self, axis: str, left: Any, right: Any, within: Sequence[str] = BASE) -> pd.DataFrame:
        """Cells that differ in `axis` alone: columns of `within` and the other axes, run_id_left, run_id_right."""
        on = [*within, *(name for name in AXES if name != axis)]
        first, second = (self.pruned[self.pruned[axis] == value][[*on, "run_id"]] for value in (left, right))
        found = pd.merge(first, second, on=on, suffixes=("_left", "_right"))
        drawn = _has_random_masks(left, right) if axis == "method" else found["method"].map(_has_random_masks)
        return found.assign(shares_masks=drawn)

    def to_dense(self, sparsity: float) -> pd.DataFrame:
        """Cells of one sparsity, each with the dense run of its base, seed and protocol on the left."""
        on = [*BASE, *OF_DENSE]
        some = self.pruned.loc[self.pruned["sparsity"] == sparsity, [*on, "method", "mode", "schedule", "run_id"]]
        found = pd.merge(self.dense[[*on, "run_id"]], some, on=on, suffixes=("_left", "_right"))
        return found.assign(shares_masks=found["method"].map(_has_random_masks))

    def differences(self, pairs: pd.DataFrame) -> list[Differences]:
        """Those of each base, over settings that have the same seeds."""
        return [self._of_base(same) for _, same in pairs.groupby(BASE, sort=True)]

    def _of_base(self, pairs: pd.DataFrame) -> Differences:
        complete = _with_common_seeds(pairs)
        by_seed = {seed: self._means(same) for seed, same in complete.groupby("seed", sort=True)}
        runs = (*complete["run_id_left"], *complete["run_id_right"])
        found = self._of_setting(complete, by_seed, runs)
        return replace(found, pairs=len(complete), shares_masks=bool(complete["shares_masks"].any()))

    def _means(self, pairs: pd.DataFrame) -> Floats:
        """(examples,) mean of right minus left."""
        both = zip(pairs["run_id_left"], pairs["run_id_right"], strict=True)
        return np.mean([self.predictions[right].scores - self.predictions[left].scores for left, right in both], axis=0)

    def scores(self, runs: pd.DataFrame) -> Differences:
        """The scores themselves of runs of one base; where a seed has several, their mean."""
        by_seed = {
            seed: np.mean([self.predictions[run].scores for run in same], axis=0)
            for seed, same in runs.groupby("seed", sort=True)["run_id"]
        }
        return self._of_setting(runs, by_seed, tuple(runs["run_id"]))

    def difference(self, left: pd.DataFrame, right: pd.DataFrame, level: float = LEVEL) -> PairedTest | None:
        """The difference of two settings of one base, over their common seeds; None if they have none."""
        before, after = _run_by_seed(left), _run_by_seed(right)
        common = [key for key in before if key in after]
        if not common:
            return None
        scores = {
            seed: self.predictions[after[seed, protocol]].scores - self.predictions[before[seed, protocol]].scores
            for seed, protocol in common
        }
        runs = (*(before[key] for key in common), *(after[key] for key in common))
        found = self._of_setting(left, scores, runs)
        [scoped] = find_scopes([found])
        e = self.estimate(scoped, level)
        return PairedTest("", "", "", len(common), scoped, e, e.p, runs)

    def _of_setting(self, rows: pd.DataFrame, by_seed: Mapping[Any, Floats], runs: tuple[str, ...]) -> Differences:
        backend, model, task = (str(rows[name].iloc[0]) for name in BASE)
        values, known = np.array(list(by_seed.values())), self.predictions[runs[0]]
        return Differences(backend, model, task, tuple(by_seed), values, known, len(by_seed), runs)

    def estimate(self, scoped: Scoped, level: float = LEVEL) -> Estimate:
        """The mean difference at a scope; of one pair of runs the interval is theirs, and these trainings have no p."""
        if scoped.pairs > 1:
            return scoped.estimate(level)
        left, right = scoped.run_ids
        return replace(difference_between_runs(self.predictions, left, right, level), p=math.nan)

    def accuracies(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """The pairs without texts, whose scores are likelihoods, which do not average with accuracies."""
        return pairs[np.array([self.is_accuracy(run) for run in pairs["run_id_left"]], bool)]

    def is_accuracy(self, run_id: str) -> bool:
        """Whether a run's scores are right or wrong answers, not log-likelihoods of a text."""
        return bool(np.isin(self.predictions[run_id].scores, (0.0, 1.0)).all())


def _run_by_seed(runs: pd.DataFrame) -> dict[tuple[int, str], str]:
    """{(seed, protocol): run} of one setting"""
    columns = (runs[name] for name in ("seed", "protocol_id", "run_id"))
    return {(seed, protocol): run for seed, protocol, run in zip(*columns, strict=True)}


def _with_common_seeds(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of settings that share seeds, so that every seed averages the same settings.

    Of the sets of seeds that settings have, the one with the most pairs; enough seeds for a verdict before fewer.
    """
    settings = pairs.groupby([name for name in SETTING if name in pairs])["seed"].agg(frozenset)

    def worth(seeds: frozenset[int]) -> tuple[bool, int, int]:
        return len(seeds) >= FEWEST_SEEDS, len(seeds) * sum(seeds <= has for has in settings), len(seeds)

    common = max(dict.fromkeys(settings), key=worth)
    whole = settings[[common <= has for has in settings]].index
    chosen = pairs.set_index(settings.index.names).index.isin(whole)
    return pairs[chosen & pairs["seed"].isin(common)]


def _has_random_masks(*methods: str) -> bool:
    """Whether the mask of a method is drawn from the seed: it is then the same for every task of a model."""
    return any(name in METHODS and METHODS[name].needs.seed for name in methods)


def difference_between_runs(
    predictions: Mapping[str, Predictions], left: str, right: str, level: float = LEVEL
) -> Estimate:
    """Two runs on the same examples: do these two models differ?"""
    a, b = predictions[left], predictions[right]
    is_accuracy = set(np.unique(a.scores)) | set(np.unique(b.scores)) <= {0.0, 1.0}
    if is_accuracy and len(set(a.tasks)) == 1:
        return paired_difference(a.scores == 1, b.scores == 1, level)
    both = Differences("", "", "", (0,), (b.scores - a.scores)[None], a, 1)
    return t_estimate(over_columns(both.blocks(1.0)), "over examples", level, len(a.ids))


def compare_values(points: Points, axis: str, simultaneous: bool = False) -> list[PairedTest]:
    """Every pair of values of one of `SETTING`: over all bases, and in each where there are several."""
    couples = [(a, b, points.pairs(axis, a, b)) for a, b in combinations(dict.fromkeys(points.pruned[axis]), 2)]
    everywhere = [(ALL_BASES, a, b, points.accuracies(pairs)) for a, b, pairs in couples]
    in_bases = [
        (", ".join(map(str, base)), a, b, same) for a, b, pairs in couples for base, same in pairs.groupby(BASE)
    ]
    several = len({about for about, *_ in in_bases}) > 1
    alone = in_bases if several or not any(len(pairs) for *_, pairs in everywhere) else []
    return [test for compared in (everywhere, alone) for test in corrected_tests(compared, points, simultaneous)]


def compare_cells(points: Points, axis: str, left: Any, right: Any, within: Sequence[str] = BASE) -> list[PairedTest]:
    """Each pair of cells by itself: which of these very models differ."""
    pairs = points.pairs(axis, left, right, within)
    names = [name for name in shown_columns([*within, *AXES], pairs) if name not in (axis, "protocol_id")]
    runs = list(zip(pairs["run_id_left"], pairs["run_id_right"], strict=True))
    found = [difference_between_runs(points.predictions, *both) for both in runs]
    return [
        PairedTest(", ".join(map(str, about)), str(left), str(right), 1, Scoped(Scope.TRAININGS, ()), e, p, both)
        for about, e, p, both in zip(pairs[names].to_numpy(), found, holm([e.p for e in found]), runs, strict=True)
    ]


def corrected_tests(
    compared: Sequence[tuple[str, Any, Any, pd.DataFrame]], points: Points, simultaneous: bool = False
) -> list[PairedTest]:
    """The tests of each (about, left, right, pairs) at each scope that they have, the most general first.

    p are corrected by Holm over those of one scope. simultaneous: the intervals hold together (Bonferroni), as those
    must that are shown because of what came out, such as the best of several.
    """
    found = [
        (scoped, str(a), str(b), about)
        for about, a, b, pairs in compared
        for scoped in find_scopes(points.differences(pairs))
    ]
    by_scope = [[f for f in found if f[0].scope is scope] for scope in reversed(Scope)]
    return [test for same in by_scope for test in _corrected_of_scope(same, points, simultaneous)]


def _corrected_of_scope(
    found: Sequence[tuple[Scoped, str, str, str]], points: Points, simultaneous: bool
) -> Iterator[PairedTest]:
    level = 1 - (1 - LEVEL) / len(found) if simultaneous and found else LEVEL
    estimates = [points.estimate(scoped, level) for scoped, *_ in found]
    for (scoped, a, b, about), e, p in zip(found, estimates, holm([e.p for e in estimates]), strict=True):
        yield PairedTest(about, a, b, scoped.pairs, scoped, e, p, scoped.run_ids)
