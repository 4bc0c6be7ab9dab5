"""Tables over the cells: how far each method and mode can be pruned, and means over many cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.read.seeds import SETTING, spread
from analysis.stats.paired import Z
from analysis.stats.scopes import Scope, Scoped
from analysis.stats.sparsity_claims import PASS_MARK
from tune_sparse.modes import dense_mode
from tune_sparse.schedules import ONE_SHOT

if TYPE_CHECKING:
    from analysis.audit.audit import Audit
    from analysis.read.imported import Imported
    from analysis.stats.comparisons import Points

COSTS = ("train_examples_per_second", "train_seconds", "peak_memory_bytes", "inference_flops")


def with_intervals(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with accuracy_low and accuracy_high: Wilson's, or for a mixture of tasks the normal interval."""
    from analysis.stats.statistics import wilson

    accuracies, stderrs, counts = (cells[c].to_numpy(float) for c in ("accuracy", "accuracy_stderr", "n_examples"))
    bounds = np.full((len(cells), 2), np.nan)
    for i, (task, accuracy, stderr, count) in enumerate(zip(cells["task"], accuracies, stderrs, counts, strict=True)):
        if "+" in task:
            bounds[i] = accuracy - Z * stderr, accuracy + Z * stderr
        elif not np.isnan(accuracy * count):
            bounds[i] = wilson(accuracy * count, int(count))
    return cells.assign(accuracy_low=bounds[:, 0], accuracy_high=bounds[:, 1])


def with_imported(cells: pd.DataFrame, imported: Sequence[Imported]) -> pd.DataFrame:
    """The cells, and after them the imported numbers: status and backend say what they are."""
    if not imported:
        return cells
    kind = {"backend": "imported", "status": "imported", "method": "none", "mode": "dense", "sparsity": 0.0}
    kind |= {"schedule": ONE_SHOT, "candidates": "", "chosen": True, "choice": ""}
    rows = [asdict(record) | kind | {"cell_id": record.record_id, "run_id": record.record_id} for record in imported]
    added = pd.DataFrame(rows).reindex(columns=cells.columns)
    return pd.concat([cells.astype({"seed": "Int64"}), added.astype({"seed": "Int64"})], ignore_index=True)


def with_warnings(cells: pd.DataFrame, found: Audit) -> pd.DataFrame:
    """The cells with the rules of the audit that speak of their run, errors in capitals."""
    return cells.assign(warnings=[found.rules_about(run_id) for run_id in cells["run_id"]])


def grouped_summary(points: Points) -> pd.DataFrame:
    """One row per base, method, mode and schedule: the mean over its pruned cells and seeds, its spread, and costs.

    sd: between the means of the seeds, where there are several. low, high: the interval over examples, where there is
    one seed.
    """
    rows = []
    for key, cells in points.pruned.groupby(SETTING[:-1], sort=True):
        found = points.scores(cells)
        by_seed, low, high = pd.Series(found.by_seed), float("nan"), float("nan")
        if len(by_seed) == 1:
            e = Scoped(Scope.TRAININGS, (found,)).estimate()
            low, high = e.low, e.high
        costs = [cells[name].median() for name in COSTS]
        ends = (cells["sparsity"].min(), cells["sparsity"].max())
        rows.append([*key, len(cells), len(by_seed), *ends, found.mean, by_seed.std(), low, high, *costs])
    names = [*SETTING[:-1], "cells", "seeds", "min_sparsity", "max_sparsity"]
    names += ["mean_score", "sd", "low", "high", *(f"median_{name}" for name in COSTS)]
    return pd.DataFrame(rows, columns=names)


def highest_passing_sparsity(performance: pd.DataFrame) -> pd.DataFrame:
    """The highest sparsity up to which accuracy, or perplexity, stays within `PASS_MARK` of the dense baseline.

    performance: as `over_seeds`. One row per backend, model, task and curve that has a dense baseline: dense_mode, the
    mode of it, metric, dense (its value), dense_spread, and highest_sparsity, which is missing where the dense accuracy
    itself is not above chance, by two of its spread and by two standard errors over its examples. A sparsity with a
    cell that is not done ends the search: nothing is said beyond a gap.
    """
    rows = []
    for key, curve in performance.groupby(SETTING[:-1], sort=True):
        curve = curve.sort_values("sparsity")
        if curve["sparsity"].iloc[0] != 0:
            continue
        metric = "accuracy" if curve["perplexity"].isna().all() else "perplexity"
        dense, dense_spread = curve[metric].iloc[0], spread(curve, metric).iloc[0]
        if metric == "accuracy":
            passed = curve[metric] >= (1 - PASS_MARK) * dense - 1e-9
            over_examples = math.sqrt(dense * (1 - dense) / curve["n_examples"].iloc[0])
            around = max(over_examples, dense_spread)  # of several seeds the spread alone forgets the examples
            means_something = dense > curve["chance_accuracy"].iloc[0] + 2 * around
        else:
            passed, means_something = curve[metric] <= (1 + PASS_MARK) * dense + 1e-9, True
        passed = (passed & (curve["seeds_done"] == curve["seeds"])).cummin()
        highest = curve.loc[passed, "sparsity"].max() if passed.iloc[0] and means_something else None
        rows.append((*key, metric, dense, dense_spread, highest))
    table = pd.DataFrame(rows, columns=[*SETTING[:-1], "metric", "dense", "dense_spread", "highest_sparsity"])
    return table.assign(dense_mode=table["mode"].map(dense_mode))
