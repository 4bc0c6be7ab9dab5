"""Every figure of a report: its file's name, what it shows, and what draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.read.seeds import SETTING, curve_names, over_seeds, spread
from analysis.report.dynamics_figures import DYNAMICS_FIGURES
from analysis.report.plots import band_handles, method_handles, method_lines, plot_over_sparsity
from analysis.report.rounding import rounded
from analysis.report.runs import Runs
from analysis.report.style import (
    COLOURS,
    LABELS,
    MARKERS,
    SPARSITY,
    assign_colours,
    legend_below,
    panels,
    write_numbers_into,
)
from tune_sparse.config import FLOPS_TOKENS
from tune_sparse.models.architectures import matrix_named
from tune_sparse.modes import SPARSE_ADAPTER_MODES

GIGA = 1e9
LAYERS_WITH_NUMBERS = 12
"""More layers than these leave no room for a number in each square."""
Draw = Callable[[pd.DataFrame, Runs], Figure | None]


@dataclass(frozen=True)
class ReportFigure:
    """A figure: the caption under it, and what draws it from the summary and the runs, or None where nothing is."""

    caption: str
    draw: Draw


def method_comparison_heatmap(cells: pd.DataFrame, runs: Runs) -> Figure | None:
    """Accuracy by method and mode (rows) and sparsity (columns), to the digits that its spread leaves."""
    done = cells[cells["accuracy"].notna()].assign(method=curve_names)
    if done.empty:
        return None
    models, tasks = sorted(done["model"].unique()), list(dict.fromkeys(done["task"]))
    means = over_seeds(done)
    table = means.assign(around=spread(means, "accuracy")).pivot_table(
        index=["model", "task", "method", "mode", "backend"], columns="sparsity", values=["accuracy", "around"]
    )
    settings = list(dict.fromkeys(zip(done["method"], done["mode"], done["backend"], strict=True)))
    levels = sorted(done["sparsity"].unique())
    names = [", ".join(setting).removesuffix(", torch") for setting in settings]
    size = (max(2.4, 0.36 * len(levels) + 0.4), max(1.2, 0.24 * len(settings) + 0.5))
    figure, axes = panels(len(models), len(tasks), size, names, sharex=True, sharey=True)
    for i, model in enumerate(models):
        for j, task in enumerate(tasks):
            rows = pd.MultiIndex.from_tuples([(model, task, *setting) for setting in settings], names=table.index.names)
            panel = table.reindex(index=rows)
            values, errors = (
                pd.DataFrame(panel[name]).reindex(columns=levels).to_numpy() for name in ("accuracy", "around")
            )
            image = axes[i][j].imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            largest = float(np.nanmax(errors)) if np.isfinite(errors).any() else None
            write_numbers_into(axes[i][j], values, partial(rounded, stderr=largest), 6.5)
            axes[i][j].set_title(f"{model}, {task}")
            axes[i][j].set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
            axes[i][j].set_yticks(range(len(settings)), names)
            axes[i][j].spines[:].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(SPARSITY)
    figure.colorbar(image, ax=axes, label=LABELS["accuracy"], shrink=0.8, pad=0.01)
    return figure


def accuracy_vs_flops(cells: pd.DataFrame, runs: Runs) -> Figure | None:
    """Accuracy over the floating-point operations of one forward pass that its sparsity leaves."""
    done = cells[cells["accuracy"].notna() & cells["inference_flops"].notna()]
    if done.empty:
        return None
    done = done.assign(method=curve_names, inference_flops=done["inference_flops"] / GIGA)
    models, tasks = sorted(done["model"].unique()), list(dict.fromkeys(done["task"]))
    colours = assign_colours(done["method"])
    figure, axes = panels(len(models), len(tasks), sharex="row", sharey=True)
    for i, model in enumerate(models):
        for j, task in enumerate(tasks):
            panel = done[(done["model"] == model) & (done["task"] == task)]
            method_lines(axes[i][j], panel, colours, "inference_flops", "accuracy")
            axes[i][j].set_title(f"{model}, {task}")
            axes[i][j].set_ylim(-0.03, 1.03)
            axes[i][j].grid(alpha=0.2)
            axes[i][j].tick_params(labelbottom=True)
            axes[i][j].set_xlabel(f"inference GFLOPs at {FLOPS_TOKENS:,} tokens")
        axes[i][0].set_ylabel(LABELS["accuracy"])
    legend_below(figure, [*method_handles(colours, done), *band_handles(done, "accuracy")])
    return figure


def flops_vs_sequence_length(cells: pd.DataFrame, runs: Runs) -> Figure | None:
    """Operations of one forward pass over its tokens, dense and at the middle and highest sparsity of each method."""
    done = cells[cells["inference_flops"].notna()].assign(method=curve_names)
    done = done.drop_duplicates(["model", "method", "sparsity", "seed"])
    if done.empty:
        return None
    levels = sorted(done["sparsity"].unique())
    levels = list(dict.fromkeys([levels[0], levels[len(levels) // 2], levels[-1]]))
    models = sorted(done["model"].unique())
    figure, axes = panels(1, len(models), (4.2, 3.0))
    for axis, model in zip(axes[0], models, strict=True):
        for colour, level in zip(COLOURS, levels, strict=False):
            curves: dict[tuple[tuple[int, float], ...], list[str]] = {}
            level_runs = done[(done["model"] == model) & (done["sparsity"] == level)]
            for method, run_ids in level_runs.groupby("method", sort=False)["run_id"]:
                curves.setdefault(_mean_flops(run_ids, runs), []).append(str(method))
            for style, (curve, methods) in zip(("-", "--", ":", "-."), curves.items(), strict=False):
                named = "dense" if level == 0 else f"{level:g} zeros: {', '.join(methods)}"
                axis.plot(*zip(*curve, strict=True), style, marker="o", ms=3, color=colour, label=named)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        tokens = sorted({int(x) for line in axis.lines for x in line.get_xdata()})
        axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axis.set_xlabel("sequence length (tokens)")
        axis.set_title(model)
        axis.grid(alpha=0.2)
        axis.legend(fontsize=7, frameon=False)
    axes[0][0].set_ylabel("inference GFLOPs")
    return figure


def _mean_flops(run_ids: Iterable[str], runs: Runs) -> tuple[tuple[int, float], ...]:
    """(tokens, GFLOPs of a forward pass), the mean of these runs."""
    records = [record for run_id in run_ids if (record := runs.record(run_id))]
    means = pd.DataFrame([record.metrics.get("inference_flops", {}) for record in records]).mean() / GIGA
    return tuple(sorted((int(str(tokens)), float(flops)) for tokens, flops in means.items()))


def mode_difference(cells: pd.DataFrame, runs: Runs) -> Figure | None:
    """Accuracy trained under the mask minus accuracy masked after training, over sparsity."""
    done = cells[cells["accuracy"].notna() & (cells["sparsity"] > 0)]
    pairs = _mode_pairs(done, runs)
    if pairs.empty:
        return None
    models, tasks = sorted(pairs["model"].unique()), list(dict.fromkeys(pairs["task"]))
    colours = assign_colours(done["method"])
    figure, axes = panels(len(models), len(tasks), sharex=True, sharey=True)
    for i, model in enumerate(models):
        for j, task in enumerate(tasks):
            axis = axes[i][j]
            axis.axhline(0, color="black", lw=0.8)
            panel = pairs[(pairs["model"] == model) & (pairs["task"] == task)]
            for (method, _), curve in panel.groupby(["method", "backend"], sort=False):
                axis.plot(curve["sparsity"], curve["difference"], marker="o", ms=3, lw=1.2, color=colours[method])
                ends = (curve["low"], curve["high"])
                axis.fill_between(curve["sparsity"], *ends, color=colours[method], alpha=0.13, lw=0)
            axis.set_title(f"{model}, {task}")
            axis.grid(alpha=0.2)
        axes[i][0].set_ylabel("sparse-to-sparse accuracy\nminus sparse-to-dense")
    for axis in axes[-1]:
        axis.set_xlabel(SPARSITY)
    handles = [Line2D([], [], color=colour, lw=3, label=str(method)) for method, colour in colours.items()]
    counts = sorted(set(pairs["seeds"]))
    bands = ["95% interval, paired examples (one seed)"] if 1 in counts else []
    bands += [f"± standard deviation between {count} seeds" for count in counts if count > 1]
    band = Line2D([], [], color="0.4", alpha=0.3, lw=6, label=", or ".join(bands))
    legend_below(figure, [*handles, band])
    return figure


def _mode_pairs(done: pd.DataFrame, runs: Runs) -> pd.DataFrame:
    """The difference of the modes over seeds, by backend, model, task, method, sparsity.

    low, high: of one seed the interval over paired examples; of several the mean less and more the standard deviation.
    """
    keys = [name for name in (*SETTING, "seed", "protocol_id") if name in done and name != "mode"]
    after, under = (done.loc[done["mode"] == mode, [*keys, "run_id", "accuracy"]] for mode in SPARSE_ADAPTER_MODES)
    pairs = pd.merge(after, under, on=keys, suffixes=("_after", "_under"))
    found = [runs.difference(a, b) for a, b in zip(pairs["run_id_after"], pairs["run_id_under"], strict=True)]
    pairs["difference"] = pairs["accuracy_under"] - pairs["accuracy_after"]
    pairs["low"], pairs["high"] = ([getattr(e, end) if e else np.nan for e in found] for end in ("low", "high"))
    grouped = pairs.groupby([name for name in keys if name != "seed"], sort=False)
    means, deviation = grouped[["difference", "low", "high"]].mean(), grouped["difference"].std()
    is_single = deviation.isna()
    means["low"] = means["low"].where(is_single, means["difference"] - deviation)
    means["high"] = means["high"].where(is_single, means["difference"] + deviation)
    return means.assign(seeds=grouped["seed"].nunique()).reset_index().sort_values("sparsity", kind="stable")


def per_layer_sparsity(cells: pd.DataFrame, runs: Runs) -> Figure | None:
    """Actual sparsity of every matrix of every layer at the sparsity nearest to one half, mean over seeds and tasks."""
    done = cells[(cells["status"] == "done") & (cells["sparsity"] > 0)].assign(method=curve_names)
    if done.empty:
        return None
    level = min(done["sparsity"].unique(), key=lambda sparsity: (abs(sparsity - 0.5), sparsity))
    chosen = done[done["sparsity"] == level].drop_duplicates(["model", "method", "task", "seed"])
    grids = {
        key: _mean_grid(run_ids, runs) for key, run_ids in chosen.groupby(["model", "method"], sort=False)["run_id"]
    }
    grids = {key: grid for key, grid in grids.items() if not grid.empty}
    if not grids:
        return None
    models, methods = sorted({model for model, _ in grids}), list(dict.fromkeys(method for _, method in grids))
    layers = max(grid.shape[1] for grid in grids.values())
    numbers = layers <= LAYERS_WITH_NUMBERS
    figure, axes = panels(len(models), len(methods), (max(2.2, 0.18 * layers), 2.1))
    for i, model in enumerate(models):
        for j, method in enumerate(methods):
            axis = axes[i][j]
            if (model, method) not in grids:
                axis.axis("off")
                continue
            grid = grids[model, method]
            image = axis.imshow(grid.to_numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
            if numbers:
                write_numbers_into(axis, grid.to_numpy(), "{:.2f}".format, 6.5)
            step = 1 if numbers else 4
            axis.set_xticks(range(0, grid.shape[1], step), [str(layer) for layer in grid.columns[::step]])
            axis.set_yticks(range(len(grid)), [*grid.index])
            axis.set_title(f"{model}, {method}")
            axis.spines[:].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label=f"{SPARSITY}, target {level:g}", shrink=0.8, pad=0.01)
    return figure


def _mean_grid(run_ids: Iterable[str], runs: Runs) -> pd.DataFrame:
    grids = [_layer_grid(runs.kept_by_matrix(run_id)) for run_id in run_ids]
    return sum(grids[1:], grids[0]) / len(grids)


def _layer_grid(kept: dict[str, tuple[int, int]]) -> pd.DataFrame:
    """Sparsity by matrix (rows) and layer (columns) from {tensor: (kept, weights)}."""
    rows = []
    for name, (left, size) in kept.items():
        if found := matrix_named(name):
            rows.append((found.module.removesuffix("_proj"), found.block, left, size))
    table = pd.DataFrame(rows, columns=["matrix", "layer", "kept", "size"])
    sums = table.groupby(["matrix", "layer"], sort=False)[["kept", "size"]].sum()
    return (1 - sums["kept"] / sums["size"]).unstack("layer").reindex(list(table["matrix"].unique()))


def throughput_vs_batch_size(cells: pd.DataFrame, runs: Runs) -> Figure | None:
    """Training tokens per second over the examples of a step, as `tune-sparse throughput` measured."""
    known = cells.drop_duplicates("run_id").set_index("run_id")
    measured = [value for value in runs.throughputs() if value["run_id"] in known.index]
    if not measured:
        return None
    models = sorted({str(known.loc[value["run_id"], "model"]) for value in measured})
    settings = list(dict.fromkeys(_measured_setting(value, known) for value in measured))
    markers = dict(zip(settings, [*MARKERS.values()] * 9, strict=False))
    colours = assign_colours(settings)
    figure, axes = panels(1, len(models), (4.2, 3.0), sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        for value in (value for value in measured if known.loc[value["run_id"], "model"] == model):
            points = [point for point in value["by_batch_size"] if point["train_tokens_per_second"]]
            rows = [point["batch_size"] for point in points]
            setting = _measured_setting(value, known)
            rates = [point["train_tokens_per_second"] for point in points]
            axis.plot(rows, rates, marker=markers[setting], ms=4, lw=1.2, color=colours[setting])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("batch size (examples)")
        axis.set_title(model)
        axis.grid(alpha=0.2)
    axes[0][0].set_ylabel(LABELS["train_tokens_per_second"])
    axes[0][0].set_ylim(bottom=0)  # of all panels, once all are drawn: it also ends the search for their top
    handles = [
        Line2D([], [], color=colours[setting], marker=markers[setting], ms=4, label=", ".join(setting))
        for setting in settings
    ]
    legend_below(figure, handles)
    return figure


def _measured_setting(value: dict[str, Any], known: pd.DataFrame) -> tuple[str, ...]:
    row = known.loc[value["run_id"]]
    pruned = () if row["sparsity"] == 0 else (str(row["method"]), f"{row['sparsity']:g}")
    return str(row["backend"]), *pruned, str(row["mode"]), str(row["task"])


def sub_adapter_fronts(cells: pd.DataFrame, runs: Runs) -> Figure | None:
    """Accuracy on selection examples over adapter weights, of the sub-adapters that no other beats in both."""
    found = list(runs.searches())
    if not found:
        return None
    bases = list(dict.fromkeys((config["model"], config["task"]) for config, _ in found))
    figure, axes = panels(1, len(bases), (4.2, 3.0), sharey=True)
    for axis, base in zip(axes[0], bases, strict=True):
        same = [(config, front) for config, front in found if (config["model"], config["task"]) == base]
        for colour, (config, front) in zip(COLOURS * 9, same, strict=False):
            points = sorted((point["parameters_fraction"], point["accuracy"]) for point in front)
            named = f"{config['method']} {config['sparsity']:g}, {config['sampler']}"
            axis.plot(*zip(*points, strict=True), "-o", ms=3, lw=1.2, color=colour, label=named)
        axis.set_xlabel("adapter weights (fraction of the maximal)")
        axis.set_title(", ".join(base))
        axis.grid(alpha=0.2)
        axis.legend(fontsize=7, frameon=False)
    axes[0][0].set_ylabel(LABELS["accuracy"])
    return figure


def _over_sparsity(column: str) -> Draw:
    return lambda cells, runs: plot_over_sparsity(cells, column)


FIGURES: dict[str, ReportFigure] = {
    "sparsity_vs_accuracy": ReportFigure(
        "Accuracy over sparsity, by method and mode, {rates}.", _over_sparsity("accuracy")
    ),
    "sparsity_vs_perplexity": ReportFigure(
        "Perplexity over sparsity, by method and mode, {rates}.", _over_sparsity("perplexity")
    ),
    "sparsity_vs_loss": ReportFigure(
        "Loss on held-out examples after training, over sparsity.", _over_sparsity("eval_loss")
    ),
    "sparsity_vs_throughput": ReportFigure(
        "Examples that training took in a second, over sparsity.", _over_sparsity("train_examples_per_second")
    ),
    "method_comparison_heatmap": ReportFigure(
        "Accuracy by method, mode and sparsity, to the digits that the largest spread of a panel leaves.",
        method_comparison_heatmap,
    ),
    "mode_difference": ReportFigure(
        "Accuracy trained under the mask minus accuracy masked after training, {rates}.",
        mode_difference,
    ),
    "accuracy_vs_flops": ReportFigure(
        "Accuracy over the operations of one forward pass, counted from non-zeros.", accuracy_vs_flops
    ),
    "flops_vs_sequence_length": ReportFigure(
        "Operations of one forward pass over its tokens, counted from non-zeros.", flops_vs_sequence_length
    ),
    "per_layer_sparsity": ReportFigure(
        "Actual sparsity of every matrix of every layer, mean over seeds and tasks.", per_layer_sparsity
    ),
    "throughput_vs_batch_size": ReportFigure("Training rate over batch size.", throughput_vs_batch_size),
    "sub_adapter_fronts": ReportFigure(
        "The fronts of the sub-adapter searches, on selection examples.", sub_adapter_fronts
    ),
    **{name: ReportFigure(caption, draw) for name, (caption, draw) in DYNAMICS_FIGURES.items()},
}
