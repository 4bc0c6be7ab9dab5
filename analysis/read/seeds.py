"""Cells over their seeds: one row a cell without its seed, and how far its means can be relied on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from tune_sparse.data import task_types
from tune_sparse.schedules import ONE_SHOT

CURVE = ["method", "mode", "schedule"]
"""What makes a curve over sparsity, on one backend, model and task."""
SETTING = ["backend", "model", "task", *CURVE, "sparsity"]
"""What makes a cell, but for its seed."""
AXIS = "axis/"
"""begins the name of a column with the values of an axis; a cell that ignores it has none"""
METRICS = (*task_types.METRICS, "f1")
"""Columns with a metric by its own name; `accuracy` has the values of the task's primary one."""
CALIBRATION = ("calibration", "calibration_order", "calibration_tokens_seen")
SINGLE_RUN = ("_stderr", "_low", "_high")
"""Ends of columns that speak of one run's examples, and say nothing of several trainings."""


def repeated_settings(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells that differ in nothing but protocol, weights or examples: two studies, never one average."""
    return cells[cells.duplicated([*SETTING, "seed"], keep=False)]


def axis_columns(cells: pd.DataFrame) -> list[str]:
    return [str(name) for name in cells if str(name).startswith(AXIS)]


def shown_columns(names: Iterable[str], cells: pd.DataFrame) -> list[str]:
    """Those columns that people are shown of these cells: no schedule where all masks are made once."""
    changes = (cells["schedule"] != ONE_SHOT).any()
    return [name for name in names if changes or name != "schedule"]


def schedule_in(name: str) -> str:
    """The schedule that a table calls so, perhaps with some of its settings."""
    return name.partition(" ")[0]


def curve_names(cells: pd.DataFrame) -> pd.Series[Any]:
    """The method of each row, with its schedule where masks change: for figures, whose colours are of one name."""
    return cells["method"].where(cells["schedule"] == ONE_SHOT, cells["method"] + ", " + cells["schedule"])


def over_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    """Return one row a cell without its seed, and a setting of axes, sorted by `SETTING`.

    `seeds` were requested and `seeds_done` are done. Numbers are means over those that are done. Where a column NAME
    has a NAME_stderr, NAME_sd is the standard deviation between seeds (over n - 1) where there are several, and
    NAME_stderr the standard error over examples where there is one; the other of both is missing. Texts that differ
    between seeds are listed.
    """
    keys = [*SETTING, *axis_columns(cells)]
    grouped = cells.assign(done=cells["status"] == "done").groupby(keys, sort=True, dropna=False)
    numbers = [str(name) for name in cells.select_dtypes("number") if name not in (*keys, "seed")]
    table = grouped[numbers].mean()
    for name in (name for name in numbers if name.endswith(SINGLE_RUN)):
        measured = name.rpartition("_")[0]
        table[name] = table[name].where(grouped[measured].count() == 1)
        if name.endswith("_stderr"):
            table.insert(list(table.columns).index(name), f"{measured}_sd", grouped[measured].std())
    for name in ("warnings", *CALIBRATION[1::-1], "primary_metric"):
        if name in cells and name not in numbers:
            listed = _rules if name == "warnings" else _listed
            table.insert(0, name, grouped[name].agg(list).map(listed))
    table.insert(0, "seeds_done", grouped["done"].sum())
    table.insert(0, "seeds", grouped["seed"].nunique())
    return table.reset_index()


def spread(table: pd.DataFrame, name: str) -> pd.Series[Any]:
    """What `over_seeds` knows of the spread of a column: between seeds, or else over examples; missing if neither."""
    missing = pd.Series(float("nan"), table.index)
    known = [table[f"{name}_{kind}"].astype(float) for kind in ("sd", "stderr") if f"{name}_{kind}" in table]
    for values in known:
        missing = missing.fillna(values)
    return missing


def spread_words(seeds: Iterable[int]) -> str:
    """Say what `spread` is, where cells have these numbers of finished seeds."""
    counts = sorted({int(count) for count in seeds if count})
    several = " or ".join(str(count) for count in counts if count > 1)
    if not several:
        return "standard error over examples (one seed)"
    between = f"standard deviation between {several} seeds"
    return f"{between}, or where there is one seed the standard error over examples" if 1 in counts else between


def shown_metrics(table: pd.DataFrame) -> dict[str, str]:
    """{name of a metric: its column} of those that some row has, the primary one of these rows first."""
    primary = "accuracy"
    if "primary_metric" in table:
        primary = _listed(table["primary_metric"]) or primary
    first = {primary: "accuracy"} if table["accuracy"].notna().any() else {}
    others = {name: name for name in METRICS if name in table and name not in first}
    return first | {name: column for name, column in others.items() if table[column].notna().any()}


def primary_words(table: pd.DataFrame) -> str:
    """Name the primary metric of each task."""
    first = {str(task): next(iter(shown_metrics(rows)), "") for task, rows in table.groupby("task", sort=False)}
    return ", ".join(f"{metric} of {task}" for task, metric in first.items() if metric)


def calibration_words(table: pd.DataFrame) -> str:
    """What each calibrated method of some rows was calibrated on: source, order, tokens seen; empty where none was."""
    known = [name for name in CALIBRATION if name in table]
    calibrated = table[table[known].notna().all(axis=1) & bool(known)] if known else table.iloc[:0]
    return "; ".join(
        f"{method}: {', '.join(_range(rows[name]) for name in known)}"
        for method, rows in calibrated.groupby("method", sort=True)
    )


def _range(values: pd.Series[Any]) -> str:
    if not pd.api.types.is_numeric_dtype(values):
        return _listed(values)
    ends = sorted({round(values.min()), round(values.max())})
    return f"{' to '.join(f'{end:,}' for end in ends)} tokens"


def _listed(values: Iterable[Any]) -> str:
    """Distinct texts, without those that are missing."""
    return " / ".join(dict.fromkeys(str(value) for value in values if not pd.isna(value) and value != ""))


def _rules(warnings: Iterable[str]) -> str:
    """The distinct rules of several lists of them."""
    return " ".join(dict.fromkeys(" ".join(warnings).split()))
