"""The result of sweeps for the terminal: a line for each finished cell, its doubts as marks, and what failed."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import pandas as pd

from analysis.audit.audit import RULES, Audit
from analysis.read.seeds import (
    AXIS,
    CURVE,
    METRICS,
    SETTING,
    axis_columns,
    calibration_words,
    over_seeds,
    schedule_in,
    shown_columns,
    shown_metrics,
    spread,
    spread_words,
)
from analysis.report.rounding import UNKNOWN
from analysis.report.tables import with_warnings
from tune_sparse.config.options import value_text
from tune_sparse.modes import dense_mode
from tune_sparse.schedules import ONE_SHOT

MOST_LINES = 45
"""of a table at the end of a sweep"""
MOST_REASONS = 5
COMMAND = "tune-sparse results"
EVERY: Mapping[str, Collection[str]] = MappingProxyType({})


def finished_cells(cells: pd.DataFrame, found: Audit, only: Mapping[str, Collection[str]] = EVERY) -> pd.DataFrame:
    """One row a finished cell without its seed, as `over_seeds`, with what a result needs besides.

    A dense baseline, which cells share, has one row. metric: the primary one. value, spread, before: of it, after and
    before tuning. difference: value minus that of the dense baseline of its mode, backend, model and task, and where
    not all of `cells` are chosen, of the same setting. `warnings` are rules of the audit. only: {column: the values
    that rows may have}.
    """
    done = with_warnings(cells[cells["status"] == "done"], found)
    is_dense, shared = done["sparsity"] == 0, {"method": "none", "schedule": ONE_SHOT}
    done = done.assign(**{name: done[name].mask(is_dense, value) for name, value in shared.items()})
    done = done.assign(mode=done["mode"].mask(is_dense, done["mode"].map(dense_mode)))
    compared = SETTING[:3] if done["chosen"].all() else [*SETTING[:3], *axis_columns(done)]
    parts = [_judged(s) for _, s in done.drop_duplicates("run_id").groupby(compared, sort=True, dropna=False)]
    return _chosen(pd.concat(parts, ignore_index=True), only) if parts else done


def _chosen(rows: pd.DataFrame, only: Mapping[str, Collection[str]]) -> pd.DataFrame:
    for name, values in only.items():
        named = rows[name].map(schedule_in) if name == "schedule" else rows[name]
        rows = rows[rows[name].isin(values) | named.isin(values)]
    return rows


def _judged(done: pd.DataFrame) -> pd.DataFrame:
    """Cells of one model and task, which have one primary metric."""
    table = over_seeds(done)
    metric, column = next(iter(shown_metrics(table).items()), ("accuracy", "accuracy"))
    dense = table.loc[table["method"] == "none"].groupby("mode")[column].mean()
    difference = table[column] - table["mode"].map(dense_mode).map(dense)
    values = {"value": table[column], "spread": spread(table, column), "before": table[f"{column}_before_tuning"]}
    return table.assign(metric=metric, **values, difference=difference)


def result_lines(
    cells: pd.DataFrame, found: Audit, most: int | None = None, only: Mapping[str, Collection[str]] = EVERY
) -> list[str]:
    """The table with its heading, legend, and what did not finish.

    most: where more lines than these would be needed, a line is a curve instead, and of curves so many are printed.
    """
    table, unfinished = finished_cells(cells, found, only), _unfinished(_chosen(cells, only))
    if table.empty:
        return ["Results: no cell is finished.", *unfinished]
    marks = _marks(table)
    is_long = most is not None and len(table) > most
    shown = _curves(table, marks) if is_long else _cells(table, marks)
    lines = [line.rstrip() for line in shown.to_string(index=False).splitlines()]
    heading = f"Results: after tuning{'' if is_long else ', with the ' + spread_words(table['seeds_done'])}:"
    if is_long and len(lines) - 1 > (most or 0):
        lines = [*lines[: (most or 0) + 1], f"and {len(shown) - (most or 0)} more"]
    more = [f"`{COMMAND}` has every cell with its spread, before tuning, and against dense."] if is_long else []
    return [heading, *lines, *more, *_legend(table, marks, is_long), *unfinished]


def _cells(table: pd.DataFrame, marks: dict[str, str]) -> pd.DataFrame:
    """A line a cell, all columns text."""
    method, *tuning = shown_columns(CURVE, table)
    names = [*(["backend"] if table["backend"].nunique() > 1 else []), "model", "task", method, "sparsity", *tuning]
    shown = table[names].assign(sparsity=[f"{value:g}" for value in table["sparsity"]], seeds=table["seeds_done"])
    for column in axis_columns(table):
        shown[column.removeprefix(AXIS)] = [_value(value) for value in table[column]]
    shown = shown.assign(metric=table["metric"])
    for name, column in (("before", "before"), ("after", "value"), ("+-", "spread"), ("- dense", "difference")):
        sign = "+" if name == "- dense" else ""
        shown[name] = [_number(value, sign) for value in table[column].astype(float)]
    for name in (name for name in METRICS if name in table):
        if (table[name].notna() & (table["metric"] != name)).any():
            shown[name] = [_other(*pair) for pair in zip(table[name], spread(table, name), strict=True)]
    if marks:
        shown["warnings"] = [_marked(warnings, marks) for warnings in table["warnings"]]
    return _left_aligned(shown, [*names, "metric"])


def _curves(table: pd.DataFrame, marks: dict[str, str]) -> pd.DataFrame:
    """A line a curve, with a column for each sparsity."""
    names = [*SETTING[:3], *shown_columns(CURVE, table), "metric"]
    texts = [
        f"{_number(value)}{_marked(warnings, marks)}"
        for value, warnings in zip(table["value"], table["warnings"], strict=True)
    ]
    wide = table.assign(text=texts).pivot(index=names, columns="sparsity", values="text").fillna(UNKNOWN).reset_index()
    wide.columns = pd.Index([name if isinstance(name, str) else f"{name:g}" for name in wide.columns])
    if wide["backend"].nunique() < 2:
        wide, names = wide.drop(columns="backend"), names[1:]
    return _left_aligned(wide, names)


def _left_aligned(shown: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    for name in names:
        width = max(len(name), shown[name].astype(str).str.len().max())
        shown = shown.assign(**{name: shown[name].astype(str).str.ljust(width)})
    return shown.rename(columns={name: name.ljust(len(shown[name].iloc[0])) for name in names})


def _value(value: Any) -> str:
    return UNKNOWN if pd.isna(value) else value_text(value)


def _number(value: float, sign: str = "") -> str:
    return UNKNOWN if pd.isna(value) else f"{value:{sign}.3f}"


def _other(value: float, around: float) -> str:
    return UNKNOWN if pd.isna(value) else f"{_number(value)} ({_number(around)})"


def _marks(table: pd.DataFrame) -> dict[str, str]:
    """{rule as a table has it: its letter} of the rules that speak of some cells and not of all."""
    rules = _rules(table)
    some = [rule for rule, count in rules.items() if count < len(table)]
    return dict(zip(some, string.ascii_letters, strict=False))


def _rules(table: pd.DataFrame) -> dict[str, int]:
    """{rule: how many cells it speaks of}, in the order of the rules."""
    found = [set(warnings.split()) for warnings in table["warnings"]]
    names = [name.upper() if rule.severity == "error" else name for name, rule in RULES.items()]
    counts = {name: sum(name in rules for rules in found) for name in names}
    return {name: count for name, count in counts.items() if count}


def _marked(warnings: str, marks: dict[str, str]) -> str:
    return "".join(mark for rule, mark in marks.items() if rule in warnings.split())


def _legend(table: pd.DataFrame, marks: dict[str, str], is_long: bool) -> list[str]:
    """What columns and marks mean."""
    everywhere = [rule for rule in _rules(table) if rule not in marks]
    calibrated = calibration_words(table)
    return [
        *([] if is_long else ["- dense: minus the dense baseline; the findings of the report say what a test shows."]),
        *([f"Calibrated on: {calibrated}."] if calibrated else []),
        *(f"{mark}: {rule}, {RULES[rule.lower()].meaning}" for rule, mark in marks.items()),
        *([f"every cell: {', '.join(everywhere)} (`tune-sparse audit` explains)"] if everywhere else []),
    ]


def _unfinished(cells: pd.DataFrame) -> list[str]:
    """How many cells did not finish, by status and reason, the commonest first."""
    left = cells[cells["status"] != "done"]
    counted = Counter(zip(left["status"], left["error"], strict=True)).most_common()
    lines = [f"{count} {status}: {reason}" for (status, reason), count in counted[:MOST_REASONS]]
    return [*lines, *([f"and {len(counted) - MOST_REASONS} more reasons"] if len(counted) > MOST_REASONS else [])]


def as_json(cells: pd.DataFrame, found: Audit, only: Mapping[str, Collection[str]] = EVERY) -> list[dict[str, Any]]:
    """The finished cells for a program: every column of `finished_cells`, missing numbers as None."""
    table = finished_cells(cells, found, only)
    return [
        {str(name): None if pd.isna(value) else value for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]
