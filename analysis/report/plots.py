"""Figures over sparsity: one panel per model and task, one line per method and mode."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from analysis.read.seeds import curve_names, over_seeds, schedule_in, spread, spread_words
from analysis.report.style import LABELS, MARKERS, SPARSITY, STYLES, assign_colours, legend_below, panels
from tune_sparse.modes import MODES, dense_mode
from tune_sparse.schedules import SCHEDULES

DENSE: dict[str, Any] = {"color": "black", "lw": 0.9, "ls": (0, (6, 2, 1, 2))}
CHANCE: dict[str, Any] = {"color": "0.55", "lw": 0.9}
PRUNED_BASELINE: dict[str, Any] = {"ls": ":", "lw": 1.1}
STARTS_DENSE = [name for name, schedule in SCHEDULES.items() if schedule.starts_dense]


def plot_over_sparsity(cells: pd.DataFrame, column: str) -> Figure | None:
    """`column` over sparsity, of the cells that have it; None if none has.

    Points are means over seeds. Bands are the standard deviation between seeds, or of one seed the standard error over
    examples, dotted lines the pruned models before tuning, dashed lines the dense baselines (black of the LoRA modes,
    grey of others), grey lines the chance level, for what has them. Marks of another backend than torch are hollow.
    """
    done = cells[cells[column].notna()].assign(method=curve_names)
    if done.empty:
        return None
    models, tasks = sorted(done["model"].unique()), list(dict.fromkeys(done["task"]))
    colours = assign_colours(done["method"])
    shared = "row" if column == "accuracy" else False
    figure, axes = panels(len(models), len(tasks), sharex=True, sharey=shared)
    for i, model in enumerate(models):
        for j, task in enumerate(tasks):
            panel = done[(done["model"] == model) & (done["task"] == task)]
            asked = cells[(cells["model"] == model) & (cells["task"] == task)]
            _draw_panel(axes[i][j], panel, asked, column, colours)
            axes[i][j].set_title(f"{model}, {task}")
        axes[i][0].set_ylabel(LABELS[column])
    for axis in axes[-1]:
        axis.set_xlabel(SPARSITY)
    legend_below(figure, _legend(colours, done, column))
    return figure


def method_lines(axis: Axes, panel: pd.DataFrame, asked: pd.DataFrame, colours: dict[Any, str], x: str, y: str) -> None:
    """A line with marks for each method, mode and backend, through the means over seeds, in a band of their spread.

    asked: the cells of the panel, finished or not: no line goes over a sparsity that has no number.
    """
    for (method, mode, backend), curve in over_seeds(panel).groupby(["method", "mode", "backend"], sort=False):
        own = asked[(asked["method"] == method) & (asked["mode"] == mode) & (asked["backend"] == backend)]
        curve, colour, style = with_gaps(curve.set_index("sparsity"), own), colours[method], str(mode)
        fill = colour if backend == "torch" else "white"
        axis.plot(curve[x], curve[y], STYLES[style], marker=MARKERS[style], ms=3, lw=1.2, color=colour, mfc=fill)
        around = spread(curve, y)
        axis.fill_between(curve[x], curve[y] - around, curve[y] + around, color=colour, alpha=0.13, lw=0)


def with_gaps(curve: pd.DataFrame, asked: pd.DataFrame) -> pd.DataFrame:
    """The rows of a curve, which are named by their sparsity, with an empty one for each sparsity that has none."""
    return curve.reindex(sorted({*curve.index, *asked["sparsity"]})).reset_index(names="sparsity")


def _draw_panel(axis: Axes, panel: pd.DataFrame, asked: pd.DataFrame, column: str, colours: dict[Any, str]) -> None:
    method_lines(axis, panel, asked, colours, "sparsity", column)
    for method, curve in pruned_before_tuning(panel, column).groupby("method", sort=False):
        known = curve.groupby("sparsity")[[f"{column}_before_tuning"]].mean()
        pruned_baseline = with_gaps(known, asked[asked["method"] == method])
        axis.plot(*(pruned_baseline[name] for name in pruned_baseline), color=colours[method], **PRUNED_BASELINE)
    for mode, dense in _dense_rows(panel).groupby("mode", sort=False):
        axis.axhline(dense[column].mean(), zorder=0, **_dense_style(mode))
    if column == "perplexity":
        axis.set_yscale("log")
        for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            set_formatter(LogFormatter(labelOnlyBase=False))  # 6.7, not 6.7 x 10^0
    if column == "accuracy":
        if panel["chance_accuracy"].notna().any():
            axis.axhline(panel["chance_accuracy"].iloc[0], zorder=0, **CHANCE)
        axis.set_ylim(-0.03, 1.03)
    if column.endswith("per_second"):
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.2)


def _dense_rows(cells: pd.DataFrame) -> pd.DataFrame:
    """The dense baselines, each with the mode that names it."""
    rows = cells[cells["sparsity"] == 0]
    return rows.assign(mode=rows["mode"].map(dense_mode))


def _dense_style(mode: Any) -> dict[str, Any]:
    return DENSE if MODES[mode].has_adapter else {**DENSE, "color": "0.55"}


def pruned_before_tuning(done: pd.DataFrame, column: str) -> pd.DataFrame:
    """The cells that have `column` of their pruned model before tuning: none of a schedule that prunes meanwhile."""
    name = f"{column}_before_tuning"
    return (
        done[done[name].notna() & ~done["schedule"].map(schedule_in).isin(STARTS_DENSE)] if name in done else done[:0]
    )


def method_handles(colours: dict[Any, str], done: pd.DataFrame) -> list[Line2D]:
    """Legend entries of methods by colour and modes by style."""
    handles = [Line2D([], [], color=colour, lw=3, label=str(method)) for method, colour in colours.items()]
    return handles + [
        Line2D([], [], color="0.2", ls=STYLES[str(mode)], marker=MARKERS[str(mode)], ms=3, label=str(mode))
        for mode in dict.fromkeys(done["mode"])
    ]


def _legend(colours: dict[Any, str], done: pd.DataFrame, column: str) -> list[Line2D]:
    handles = method_handles(colours, done)
    if len(pruned_before_tuning(done, column)):
        handles.append(Line2D([], [], color="0.2", label="before tuning", **PRUNED_BASELINE))
    for mode in _dense_rows(done)["mode"].unique():
        label = "dense baseline" if MODES[mode].has_adapter else f"dense baseline, {mode}"
        handles.append(Line2D([], [], label=label, **_dense_style(mode)))
    if column == "accuracy":
        handles.append(Line2D([], [], label="chance", **CHANCE))
    return [*handles, *band_handles(done, column)]


def band_handles(done: pd.DataFrame, column: str) -> list[Line2D]:
    """The legend entry of the bands, where there are any."""
    table = over_seeds(done)
    if spread(table, column).isna().all():
        return []
    return [Line2D([], [], color="0.4", alpha=0.3, lw=6, label=f"± {spread_words(table['seeds_done'])}")]
