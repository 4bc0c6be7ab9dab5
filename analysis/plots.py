"""Figures over sparsity: one panel per model and task, one line per method and mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.load import COLUMNS
from tune_sparse.paths import aside

# Okabe & Ito (2008): told apart by colour-blind readers, and in grey by their brightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = {"sparse-to-dense": "-", "sparse-to-sparse": "--", "dense": ":"}
MARKERS = {"sparse-to-dense": "o", "sparse-to-sparse": "s", "dense": "^"}


def plot_over_sparsity(cells: pd.DataFrame, column: str, path: Path) -> None:
    """Draw `column` of the cells that have it over sparsity into a PNG file.

    Points are means over seeds. Bands are one standard error of a cell's examples, thin dotted lines the pruned
    models before tuning, and grey lines the chance level, for what has them.
    """
    done = cells[cells[column].notna()]
    models, tasks = sorted(done["model"].unique()), list(dict.fromkeys(done["task"]))
    colours: dict[Any, str] = dict(zip(dict.fromkeys(done["method"]), COLOURS * 9, strict=False))
    figure, axes = plt.subplots(
        len(models),
        len(tasks),
        figsize=(3.6 * len(tasks), 2.7 * len(models) + 0.7),
        squeeze=False,
        sharex=True,
        sharey="row" if column == "accuracy" else False,
        layout="constrained",
    )
    for i, model in enumerate(models):
        for j, task in enumerate(tasks):
            panel = done[(done["model"] == model) & (done["task"] == task)]
            _draw_panel(axes[i][j], panel, column, colours)
            axes[i][j].set_title(f"{model}, {task}", fontsize=9)
        axes[i][0].set_ylabel(column.replace("_", " "))
    for axis in axes[-1]:
        axis.set_xlabel("sparsity (fraction of zeros)")
    figure.legend(handles=_legend(colours, done, column), loc="outside lower center", ncols=4, fontsize=8)
    partial = aside(path)
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
    plt.close(figure)


def _draw_panel(axis: Axes, panel: pd.DataFrame, column: str, colours: dict[Any, str]) -> None:
    for (method, mode), curve in panel.groupby(["method", "mode"], sort=False):
        means = curve.groupby("sparsity")[[column, *_stderr(column)]].mean().reset_index()
        axis.plot(
            means["sparsity"],
            means[column],
            STYLES[str(mode)],
            marker=MARKERS[str(mode)],
            ms=3,
            lw=1.3,
            color=colours[str(method)],
        )
        for name in _stderr(column):
            low, high = (means[column] + sign * means[name] for sign in (-1, 1))
            axis.fill_between(means["sparsity"], low, high, color=colours[str(method)], alpha=0.12, lw=0)
    if f"{column}_before_tuning" in panel:
        for method, curve in panel.groupby("method", sort=False):
            untuned = curve.groupby("sparsity")[f"{column}_before_tuning"].mean()
            axis.plot(untuned.index, untuned, ":", lw=1, color=colours[str(method)])
    if column == "perplexity":
        axis.set_yscale("log")
    if column == "accuracy":
        axis.axhline(panel["chance_accuracy"].iloc[0], color="0.6", lw=0.8) if len(panel) else None
        axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.2)


def _stderr(column: str) -> list[str]:
    """The column with the standard error of `column`, if there is one."""
    return [name for name in COLUMNS if name == f"{column}_stderr"]


def _legend(colours: dict[Any, str], done: pd.DataFrame, column: str) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, lw=3, label=method) for method, colour in colours.items()]
    handles += [
        Line2D([], [], color="0.2", ls=STYLES[str(mode)], marker=MARKERS[str(mode)], ms=3, label=mode)
        for mode in dict.fromkeys(done["mode"])
    ]
    if f"{column}_before_tuning" in done:
        handles.append(Line2D([], [], color="0.2", ls=":", lw=1, label="before tuning"))
    if column == "accuracy":
        handles.append(Line2D([], [], color="0.6", lw=0.8, label="chance"))
    return handles
