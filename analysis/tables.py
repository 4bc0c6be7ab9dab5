"""Tables over the cells: means over seeds, and how far each method and mode can be pruned."""

from __future__ import annotations

import pandas as pd

SETTING = ["backend", "model", "task", "method", "mode", "sparsity"]
PERFORMANCE = [
    "chance_accuracy",
    "counted_sparsity",
    "accuracy",
    "accuracy_stderr",
    "accuracy_before_tuning",
    "accuracy_before_merge",
    "perplexity",
    "perplexity_before_tuning",
    "train_loss",
    "eval_loss",
    "train_samples_per_second",
    "inference_flops",
]
PASS_MARK = 0.10
"""Accuracy may fall, perplexity may rise, by this fraction of the dense baseline."""


def sparsity_vs_performance(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: means over the seeds that are done, and how many of the asked seeds they are."""
    grouped = cells.assign(done=cells["status"] == "done").groupby(SETTING, sort=True)
    table = grouped[PERFORMANCE].mean()
    table.insert(0, "seeds_done", grouped["done"].sum())
    table.insert(0, "seeds", grouped["seed"].nunique())
    return table.reset_index()


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
