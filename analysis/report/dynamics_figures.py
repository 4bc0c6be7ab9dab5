"""Figures of masks that change: a panel for each base, method and schedule, a line or a bar for each level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.read.dynamics import IMPOSSIBLE, RunDynamics, named_schedule
from analysis.report.runs import Runs
from analysis.report.style import SPARSITY, legend_below, panels
from tune_sparse.models.architectures import matrix_named

PHASES = {"before the first update": "#56B4E9", "masks change": "#E69F00", "after the last update": "#009E73"}
MOST_BARS = 32
"""More matrices than these are shown as one bar a block."""
Points = Callable[[RunDynamics], Sequence[tuple[float, float]]]
Draw = Callable[[pd.DataFrame, Runs], Figure | None]
Placed = Iterator[tuple[Axes, list[RunDynamics]]]
"""each panel, with the runs that it shows"""


def values(name: str, updates_only: bool = False) -> Points:
    """(step, value) of the records that have a value of this name; `updates_only` leaves out those between."""

    def points(found: RunDynamics) -> list[tuple[float, float]]:
        lines = found.updates if updates_only else found.lines
        return [(line["step"], line[name]) for line in lines if name in line]

    return points


@dataclass(frozen=True)
class OverSteps:
    """A figure over the steps of a training."""

    label: str
    points: Points
    is_revival: bool = False
    """Said to be impossible where it is."""
    has_target: bool = False
    is_stepped: bool = False
    """A value holds until the next."""
    needs_updates: bool = True
    """Drawn only of runs whose masks changed."""

    def __call__(self, cells: pd.DataFrame, runs: Runs) -> Figure | None:
        shown = [d for d in _shown(cells, runs) if self.points(d) and (d.updates or not self.needs_updates)]
        if not shown or (self.is_revival and not any(d.may_revive for d in shown)):
            return None
        colours = _level_colours(shown)
        figure, placed = _panels(shown)
        for axis, own in placed:
            self._draw(axis, own, colours)
        handles = [*_level_handles(colours), *_phase_handles(shown)]
        if self.has_target:
            handles.append(Line2D([], [], color="0.4", ls=":", lw=1, label="target"))
        legend_below(figure, handles)
        return figure

    def _draw(self, axis: Axes, own: Sequence[RunDynamics], colours: Mapping[float, str]) -> None:
        _shade_phases(axis, own)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(self.label)
        axis.grid(alpha=0.2)
        axis.set_xlim(0, max(found.lines[-1]["step"] for found in own))
        if self.is_revival and not any(d.may_revive for d in own):
            axis.text(0.5, 0.5, f"revival: {IMPOSSIBLE}", transform=axis.transAxes, ha="center", va="center")
            return
        for found in own:
            steps, numbers = zip(*self.points(found), strict=True)
            colour = colours[found.run.cell.sparsity]
            style = "steps-post" if self.is_stepped else "default"
            axis.plot(steps, numbers, color=colour, lw=1.2, marker="o", ms=2.5, drawstyle=style, alpha=0.85)
            if self.has_target:
                axis.axhline(found.run.cell.sparsity, color=colour, ls=":", lw=1)


@dataclass(frozen=True)
class Bars:
    """A figure of the last record: a bar for each matrix and level, the mean over seeds; of a large model for each
    block, the mean over its matrices too."""

    label: str
    prefix: str
    suffix: str = ""
    highest: float | None = None
    """of the axis; by default that of the bars"""

    def __call__(self, cells: pd.DataFrame, runs: Runs) -> Figure | None:
        shown = _shown(cells, runs)
        if not shown:
            return None
        colours = _level_colours(shown)
        figure, placed = _panels(shown, width=max(3.4, 0.22 * max(len(self._heights(d)) for d in shown)))
        for axis, own in placed:
            self._draw(axis, own, colours)
        for axis in figure.axes:
            axis.set_ylim(0, self.highest)  # once all are drawn: it ends the search for the top of their row
        legend_below(figure, _level_handles(colours))
        return figure

    def _heights(self, found: RunDynamics) -> pd.Series[float]:
        last = found.lines[-1]
        named = {
            name.removeprefix(self.prefix).removesuffix(self.suffix): value
            for name, value in last.items()
            if name.startswith(self.prefix) and name.endswith(self.suffix) and "/average" not in name
        }
        heights = pd.Series(named, dtype=float)
        if len(heights) <= MOST_BARS:
            return heights.set_axis(short_names(heights.index))
        return heights.groupby(_block_name, sort=False).mean()

    def _draw(self, axis: Axes, own: Sequence[RunDynamics], colours: Mapping[float, str]) -> None:
        levels = sorted({d.run.cell.sparsity for d in own})
        for i, level in enumerate(levels):
            heights = pd.concat([self._heights(d) for d in own if d.run.cell.sparsity == level], axis=1).mean(axis=1)
            places = np.arange(len(heights)) + (i - (len(levels) - 1) / 2) * 0.8 / len(levels)
            axis.bar(places, heights, 0.8 / len(levels), color=colours[level])
        axis.set_xticks(range(len(heights)), list(heights.index), rotation=90, fontsize=6.5)
        axis.set_xlabel("block and matrix" if " " in heights.index[0] else "block")
        axis.set_ylabel(self.label)
        axis.grid(alpha=0.2, axis="y")


def short_names(names: Iterable[str]) -> list[str]:
    """Block and layer of each matrix; GPT-2 has two of one layer's name in a block, told apart by their parts."""
    short = [(name, _block_and_layer(name)) for name in names]
    times = Counter(label for _, label in short)
    return [label if times[label] == 1 else _block_and_layer(name, whole=True) for name, label in short]


def _block_and_layer(name: str, whole: bool = False) -> str:
    matrix = matrix_named(name)
    if not matrix:
        return name
    layer = matrix.layer.partition(".")[2].removesuffix("_proj")
    return f"{matrix.block} {matrix.layer if whole or not layer else layer}"


def _block_name(name: str) -> str:
    matrix = matrix_named(name)
    return str(matrix.block) if matrix else name


def _shown(cells: pd.DataFrame, runs: Runs) -> list[RunDynamics]:
    """The records of done runs, by level."""
    done = cells[cells["status"] == "done"].drop_duplicates("run_id").to_dict("records")
    found = runs.dynamics(cell["run_id"] for cell in done)
    known = [(cell, found[cell["run_id"]]) for cell in done if cell["run_id"] in found]
    named = (replace(d, schedule=named_schedule(cell, d)) for cell, d in known)
    return sorted(named, key=lambda d: (d.run.cell.sparsity, d.run.cell.seed))


def _key(found: RunDynamics) -> tuple[str, str, str, str]:
    """The model, task, method and schedule of a run, which has a panel."""
    cell = found.run.cell
    return cell.model, cell.task, cell.method, found.schedule


def _panels(shown: Sequence[RunDynamics], width: float = 3.4) -> tuple[Figure, Placed]:
    """A row for each model and task, a column for each method and schedule; those without runs stay empty."""
    keys = list(dict.fromkeys(map(_key, shown)))
    rows, columns = (sorted({key[part] for key in keys}) for part in (slice(0, 2), slice(2, 4)))
    figure, axes = panels(len(rows), len(columns), (width, 2.5), sharey="row")

    def placed() -> Placed:
        for (i, j), axis in np.ndenumerate(axes):
            own = [found for found in shown if _key(found) == (*rows[i], *columns[j])]
            if not own:
                axis.axis("off")
                continue
            axis.set_title(f"{', '.join(rows[i])}\n{', '.join(columns[j])}")
            axis.tick_params(labelleft=True)
            yield axis, own

    return figure, placed()


def _level_colours(shown: Sequence[RunDynamics]) -> dict[float, str]:
    levels = sorted({found.run.cell.sparsity for found in shown})
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(levels)))
    return {level: mpl.colors.to_hex(shade) for level, shade in zip(levels, shades, strict=True)}


def _level_handles(colours: Mapping[float, str]) -> list[Line2D]:
    return [Line2D([], [], color=colour, lw=3, label=f"sparsity {level:g}") for level, colour in colours.items()]


def _phase_ends(own: Sequence[RunDynamics]) -> tuple[float, float] | None:
    """The first and the last step after which masks of any of the runs changed."""
    steps = [line["step"] for found in own for line in found.updates]
    return (min(steps), max(steps)) if steps else None


def _shade_phases(axis: Axes, own: Sequence[RunDynamics]) -> None:
    ends = _phase_ends(own)
    if ends:
        edges = (0, *ends, max(found.lines[-1]["step"] for found in own))
        for start, end, colour in zip(edges, edges[1:], PHASES.values(), strict=False):
            axis.axvspan(start, end, color=colour, alpha=0.12, lw=0)


def _phase_handles(shown: Sequence[RunDynamics]) -> list[Patch]:
    if not _phase_ends(shown):
        return []
    return [Patch(color=colour, alpha=0.25, lw=0, label=name) for name, colour in PHASES.items()]


DYNAMICS_FIGURES: dict[str, tuple[str, Draw]] = {
    "sparsity_over_steps": (
        "Counted sparsity over the steps of a training, where masks change.",
        OverSteps(SPARSITY, values("sparsity/overall"), has_target=True, is_stepped=True),
    ),
    "revival_rate": (
        "Share of the zeros that each update of the masks revived.",
        OverSteps("revived (fraction of zeros)", values("weight_revival/rate", updates_only=True), is_revival=True),
    ),
    "revived_weights": (
        "Weights that each update of the masks revived.",
        OverSteps("revived weights", values("weight_revival/revived", updates_only=True), is_revival=True),
    ),
    "stable_zeros": (
        "Weights that were zero before and after each update of the masks.",
        OverSteps("stable zeros (weights)", values("weight_revival/stable_zeros", updates_only=True)),
    ),
    "final_layer_sparsity": (
        "Counted sparsity of each matrix after training, where weights themselves are trained; of a large model of "
        "each block.",
        Bars(SPARSITY, "layer_sparsity/", highest=1),
    ),
    "dead_outputs": (
        "Outputs of each matrix of which no weight is left after training, where weights themselves are trained.",
        Bars("dead outputs (fraction)", "dead_neurons/", ".out"),
    ),
    "effective_rank": (
        "Effective rank over the steps of a training: singular values above 1% of the largest, mean over matrices.",
        OverSteps("effective rank (fraction)", values("effective_rank/average"), needs_updates=False),
    ),
    "eval_loss_over_steps": (
        "Loss on held-out examples over the steps of a training, where weights themselves are trained.",
        OverSteps("eval loss (nats per token)", lambda found: found.eval_losses, needs_updates=False),
    ),
}
"""Name of a file: its caption, and what draws it."""
