"""Tables over the cells: means over seeds, and how far each method and mode can be pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.read.load import SCORES
from analysis.stats.paired import Z
from analysis.stats.sparsity_claims import PASS_MARK

if TYPE_CHECKING:
    from analysis.audit.audit import Audit
    from analysis.read.imported import Imported
    from analysis.stats.comparisons import Points

SETTING = ["backend", "model", "task", "method", "mode", "sparsity"]
PERFORMANCE = [
    "chance_accuracy",
    "actual_sparsity",
    "accuracy",
    "accuracy_stderr",
    "accuracy_low",
    "accuracy_high",
    *SCORES[2:],
    "cut_fraction",
    "train_loss",
    "eval_loss",
    "eval_loss_before_mask",
    "train_examples_per_second",
    "inference_flops",
]
COSTS = ("train_examples_per_second", "train_seconds", "peak_memory_bytes", "inference_flops")


def sparsity_vs_performance(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: means over the seeds that are done, and how many of the requested seeds they are."""
    grouped = cells.assign(done=cells["status"] == "done").groupby(SETTING, sort=True)
    table = grouped[[name for name in PERFORMANCE if name in cells]].mean()
    table.insert(0, "seeds_done", grouped["done"].sum())
    table.insert(0, "seeds", grouped["seed"].nunique())
    return table.reset_index()


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
    rows = [asdict(record) | kind | {"cell_id": record.record_id, "run_id": record.record_id} for record in imported]
    added = pd.DataFrame(rows).reindex(columns=cells.columns)
    return pd.concat([cells.astype({"seed": "Int64"}), added.astype({"seed": "Int64"})], ignore_index=True)


def with_warnings(cells: pd.DataFrame, found: Audit) -> pd.DataFrame:
    """The cells with the rules of the audit that speak of their run, errors in capitals."""
    return cells.assign(warnings=[found.rules_about(run_id) for run_id in cells["run_id"]])


def grouped_summary(points: Points) -> pd.DataFrame:
    """One row per base, method and mode: the mean over its pruned cells, its interval (over examples), and costs."""
    rows = []
    for key, cells in points.pruned.groupby([*SETTING[:3], "method", "mode"], sort=True):
        of_cells = [points.predictions[run] for run in cells["run_id"]]
        scores, weights = np.mean([a.scores for a in of_cells], axis=0), of_cells[0].weights
        mean = float(np.dot(weights, scores))
        stderr = float(np.sqrt(np.dot(weights**2, (scores - mean) ** 2)))
        costs = {f"median_{name}": cells[name].median() for name in COSTS}
        spread = {f"{name}_sparsity": getattr(cells["sparsity"], name)() for name in ("min", "max")}
        low, high = mean - Z * stderr, mean + Z * stderr
        rows.append([*key, len(cells), *spread.values(), mean, low, high, *costs.values()])
    names = [*SETTING[:3], "method", "mode", "cells", "min_sparsity", "max_sparsity", "mean_score", "low", "high"]
    return pd.DataFrame(rows, columns=[*names, *(f"median_{name}" for name in COSTS)])


def highest_passing_sparsity(performance: pd.DataFrame) -> pd.DataFrame:
    """The highest sparsity up to which accuracy, or perplexity, stays within `PASS_MARK` of the dense baseline.

    One row per backend, model, task, method and mode that has a dense baseline: metric, dense (its value), and
    highest_sparsity, which is missing where the dense accuracy itself is not two standard errors above chance. A
    sparsity with a cell that is not done ends the search: nothing is said beyond a gap.
    """
    rows = []
    for key, curve in performance.groupby(SETTING[:-1], sort=True):
        curve = curve.sort_values("sparsity")
        if curve["sparsity"].iloc[0] != 0:
            continue
        metric = "accuracy" if curve["perplexity"].isna().all() else "perplexity"
        dense = curve[metric].iloc[0]
        if metric == "accuracy":
            passed = curve[metric] >= (1 - PASS_MARK) * dense - 1e-9
            means_something = dense > curve["chance_accuracy"].iloc[0] + 2 * curve["accuracy_stderr"].iloc[0]
        else:
            passed, means_something = curve[metric] <= (1 + PASS_MARK) * dense + 1e-9, True
        passed = (passed & (curve["seeds_done"] == curve["seeds"])).cummin()
        highest = curve.loc[passed, "sparsity"].max() if passed.iloc[0] and means_something else None
        rows.append((*key, metric, dense, highest))
    return pd.DataFrame(rows, columns=[*SETTING[:-1], "metric", "dense", "highest_sparsity"])
