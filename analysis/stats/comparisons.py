"""Pairs of cells that differ in one thing alone, and the tests of their differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.read.results import Predictions
from analysis.stats.statistics import (
    Estimate,
    Floats,
    clustered_mean,
    holm,
    naive_paired_t,
    paired_bootstrap,
    paired_difference,
)
from tune_sparse.modes import ADAPTER_MODES

BASE = ["backend", "model", "task"]
"""A base model on a task, from which cells grow."""
AXES = ["method", "mode", "sparsity", "seed"]
ALL_BASES = "all base models and tasks"
NAIVE_WARNING = "not behind any claim: cells share examples and base models"


@dataclass(frozen=True)
class PairedTest:
    """One comparison: `right` minus `left`, over the cells that differ in nothing else."""

    about: str
    left: str
    right: str
    cells: int
    estimate: Estimate
    p_corrected: float
    """by Holm, over the comparisons that answer the same question"""
    run_ids: tuple[str, ...]
    warning: str = ""

    @property
    def is_shown(self) -> bool:
        return not self.warning and self.p_corrected < 0.05

    def row(self, question: str) -> dict[str, Any]:
        e = self.estimate
        return {
            "question": question,
            "about": self.about,
            "left": self.left,
            "right": self.right,
            "cells": self.cells,
            "difference": e.value,
            "low": e.low,
            "high": e.high,
            "p": e.p,
            "p_corrected": self.p_corrected,
            "test": e.test,
            "warning": self.warning,
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

    Cells at sparsity 0 share their runs and are the baseline of a curve, `dense`. Of runs that answered other questions
    than most of their model and task, nothing is compared: the audit calls them mixed.
    """

    def __init__(self, cells: pd.DataFrame, predictions: Mapping[str, Predictions]) -> None:
        done = cells[(cells["status"] == "done") & cells["run_id"].isin(list(predictions))]
        questions = done["run_id"].map(lambda run: hash(tuple(predictions[run].ids)))
        usual = questions.groupby([done["model"], done["task"]]).transform(lambda same: same.mode()[0])
        done = done[questions == usual]
        self.pruned = done[done["sparsity"] > 0].drop_duplicates("run_id")
        self.dense = done[(done["sparsity"] == 0) & done["mode"].isin(ADAPTER_MODES)].drop_duplicates("run_id")
        self.predictions = predictions

    def pairs(self, axis: str, left: Any, right: Any, within: Sequence[str] = BASE) -> pd.DataFrame:
        """Cells that differ in `axis` alone: columns of `within` and the other axes, run_id_left, run_id_right."""
        on = [*within, *(name for name in AXES if name != axis)]
        first, second = (self.pruned[self.pruned[axis] == value][[*on, "run_id"]] for value in (left, right))
        return pd.merge(first, second, on=on, suffixes=("_left", "_right"))

    def to_dense(self, sparsity: float) -> pd.DataFrame:
        """Cells of one sparsity, each with the dense run of its base and seed on the left."""
        dense = self.dense[[*BASE, "seed", "run_id"]]
        some = self.pruned[self.pruned["sparsity"] == sparsity]
        return pd.merge(dense, some, on=[*BASE, "seed"], suffixes=("_left", "_right"))

    def differences(self, pairs: pd.DataFrame) -> Floats:
        """(cells, examples) of right minus left, for pairs of one base."""
        both = zip(pairs["run_id_left"], pairs["run_id_right"], strict=True)
        return np.stack([self.predictions[right].scores - self.predictions[left].scores for left, right in both])

    def over_base(self, pairs: pd.DataFrame) -> Estimate:
        """The mean difference of one base: its cells and its examples stand for all that could have been drawn."""
        values, predictions = self.differences(pairs), self.predictions[pairs["run_id_left"].iloc[0]]
        cells, count = values.shape
        if cells == 1:
            return difference_between_runs(self.predictions, *pairs[["run_id_left", "run_id_right"]].iloc[0])
        by_cell, by_example = np.repeat(np.arange(cells), count), np.tile(np.arange(count), cells)
        return clustered_mean(values.ravel(), np.tile(predictions.weights, cells), by_cell, by_example, "cell")

    def over_bases(self, pairs: pd.DataFrame) -> Estimate:
        """The mean difference of several bases, each counting alike: they stand for all that could have been taken."""
        values, weights, bases, examples = [], [], [], []
        for base, same in pairs.groupby(BASE, sort=True):
            predictions = self.predictions[same["run_id_left"].iloc[0]]
            values.append(self.differences(same).mean(axis=0))
            weights.append(predictions.weights)
            bases += [base[1:]] * len(predictions.ids)  # two backends do not make two base models
            examples += list(zip(predictions.tasks, predictions.ids, strict=True))
        return clustered_mean(np.concatenate(values), np.concatenate(weights), bases, examples, "base model and task")

    def accuracies(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """The pairs without texts, whose scores are likelihoods, which do not average with accuracies."""
        return pairs[np.array([self.is_accuracy(run) for run in pairs["run_id_left"]], bool)]

    def is_accuracy(self, run_id: str) -> bool:
        """Whether a run's scores are right or wrong answers, not log-likelihoods of a text."""
        return bool(np.isin(self.predictions[run_id].scores, (0.0, 1.0)).all())


def count_bases(pairs: pd.DataFrame) -> int:
    """How many base models and tasks; backends do not multiply them."""
    return len(pairs[["model", "task"]].drop_duplicates())


def difference_between_runs(predictions: Mapping[str, Predictions], left: str, right: str) -> Estimate:
    """Two runs on the same examples."""
    a, b = predictions[left], predictions[right]
    is_accuracy = set(np.unique(a.scores)) | set(np.unique(b.scores)) <= {0.0, 1.0}
    if is_accuracy and len(set(a.tasks)) == 1:
        return paired_difference(a.scores == 1, b.scores == 1)
    return paired_bootstrap((b.scores - a.scores) * a.weights * len(a.weights))


def compare_values(points: Points, axis: str) -> list[PairedTest]:
    """Every pair of values of `axis` ("method" or "mode"): in each base, over all bases, and, with its warning, by
    the plain paired t. Corrected over the pairs and bases of each of the three."""
    values = list(dict.fromkeys(points.pruned[axis]))
    couples = [(a, b, points.pairs(axis, a, b)) for a, b in combinations(values, 2)]
    couples = [couple for couple in couples if len(couple[2])]
    in_bases = [
        (", ".join(map(str, base)), a, b, same) for a, b, pairs in couples for base, same in pairs.groupby(BASE)
    ]
    everywhere = [(ALL_BASES, a, b, points.accuracies(pairs)) for a, b, pairs in couples]
    everywhere = [pair for pair in everywhere if count_bases(pair[3]) > 1]
    return [
        *corrected_tests(everywhere, points.over_bases),
        *corrected_tests(in_bases, points.over_base),
        *corrected_tests(everywhere, lambda pairs: _naive(points, pairs), NAIVE_WARNING),
    ]


def compare_cells(points: Points, axis: str, left: Any, right: Any, within: Sequence[str] = BASE) -> list[PairedTest]:
    """Each pair of cells by itself: which of these very models differ."""
    pairs = points.pairs(axis, left, right, within)
    compared = [
        (", ".join(f"{row[name]}" for name in [*within, *AXES] if name != axis), left, right, pairs.loc[[index]])
        for index, row in pairs.iterrows()
    ]
    return corrected_tests(compared, points.over_base)


def corrected_tests(
    compared: Sequence[tuple[str, Any, Any, pd.DataFrame]],
    estimate: Callable[[pd.DataFrame], Estimate],
    warning: str = "",
) -> list[PairedTest]:
    """A test of each (about, left, right, pairs), corrected by Holm over all of them."""
    found = [estimate(pairs) for *_, pairs in compared]
    corrected = holm([e.p for e in found])
    return [
        PairedTest(about, str(a), str(b), len(pairs), e, p, (*pairs["run_id_left"], *pairs["run_id_right"]), warning)
        for (about, a, b, pairs), e, p in zip(compared, found, corrected, strict=True)
    ]


def _naive(points: Points, pairs: pd.DataFrame) -> Estimate:
    both = zip(pairs["run_id_left"], pairs["run_id_right"], strict=True)
    return naive_paired_t([points.predictions[b].mean() - points.predictions[a].mean() for a, b in both])
