"""Colours, marks, labels with units, and the saving that all figures share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tune_sparse.files import atomic_file

# Okabe & Ito (2008): told apart by colour-blind readers, and in grey by their brightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = {"sparse-to-dense": "-", "sparse-to-sparse": "--", "dense": ":", "masked-finetuning": "-."}
MARKERS = {"sparse-to-dense": "o", "sparse-to-sparse": "s", "dense": "^", "masked-finetuning": "D"}
SPARSITY = "sparsity (fraction of zeros)"
LABELS = {
    "accuracy": "accuracy (fraction right)",
    "perplexity": "perplexity (per token)",
    "eval_loss": "eval loss (nats per token)",
    "train_examples_per_second": "training rate (examples/s)",
    "train_tokens_per_second": "training rate (tokens/s)",
}
SCREEN_DPI = 150
PANEL_INCHES = (3.4, 2.5)
LEGEND_INCHES = 0.9
LETTER_INCHES = 0.07

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "savefig.dpi": SCREEN_DPI,
        "pdf.fonttype": 42,  # text stays text in print
        "figure.max_open_warning": 0,
    }
)


def assign_colours(names: Iterable[Any]) -> dict[Any, str]:
    """A colour for each name, in their order."""
    return dict(zip(dict.fromkeys(names), COLOURS * 9, strict=False))


def panels(
    rows: int, columns: int, size: Sequence[float] = PANEL_INCHES, labels: Iterable[str] = (), **options: Any
) -> tuple[Figure, Any]:
    """A figure of (rows, columns) axes with room for a legend below, and for long `labels` on the left."""
    room = LETTER_INCHES * max(map(len, labels), default=0)
    width, height = columns * size[0] + room, rows * size[1] + LEGEND_INCHES
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    width_inches = figure.get_size_inches()[0]
    longest_inches = 0.7 + LETTER_INCHES * max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(width_inches // longest_inches)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def write_numbers_into(axis: Axes, values: Any, text_of: Any, size: float) -> None:
    """`text_of` each finite value of a drawn matrix (rows, columns), dark on bright and bright on dark."""
    [image] = axis.images
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axis.text(j, i, text_of(value), ha="center", va="center", fontsize=size, color="black" if dark else "white")


def save(figure: Figure, path: Path) -> None:
    """Save a PNG at `path` and, for print, a PDF beside it; each whole or not at all."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # laid out once, not again for each file
    for suffix in (".png", ".pdf"):
        # without the date, the same figure is the same file
        metadata = {"CreationDate": None} if suffix == ".pdf" else None
        with atomic_file(path.with_suffix(suffix)) as partial:
            figure.savefig(partial, format=suffix[1:], metadata=metadata)
    plt.close(figure)
