"""How the settings of cells were chosen where a sweep had axes: the chosen one, how flat the choice was, its price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from analysis.read.seeds import AXIS, SETTING, axis_columns
from tune_sparse.config.axes import PAIRED
from tune_sparse.config.options import value_text

NUMBERS = ("selection_loss", "second_is_higher_by", "spread_of_primary", "runs", "hours", "siblings_hours")
COLUMNS = (*SETTING, "axes", "candidates", "chosen", *NUMBERS, "not_chosen")
HOUR = 3600


def choices_table(requested: pd.DataFrame) -> pd.DataFrame:
    """One row a cell over its seeds that was requested at several settings, all columns of `COLUMNS`.

    requested: every setting, as `cells_table`. selection_loss: of the chosen setting, mean over seeds.
    second_is_higher_by: the next lowest minus it. spread_of_primary: the largest minus the smallest mean of the primary
    metric over all finished settings, of which none is picked by it. runs, hours: of all settings; siblings_hours:
    without the chosen.
    """
    several = requested[requested["candidates"].str.contains(", ", regex=False)]
    grouped = several.groupby([*SETTING, "candidates"], sort=True)
    return pd.DataFrame([_row(key, same) for key, same in grouped], columns=list(COLUMNS))


def _row(key: tuple[Any, ...], cells: pd.DataFrame) -> tuple[Any, ...]:
    names = [name for name in axis_columns(cells) if cells[name].notna().any()]
    runs = cells.drop_duplicates("run_id")
    by_setting = cells.assign(done=cells["status"] == "done").groupby(names, sort=False, dropna=False)
    done, metric = by_setting["done"].all(), "accuracy" if cells["perplexity"].isna().all() else "perplexity"
    losses, primary = (by_setting[name].mean()[done] for name in ("eval_loss", metric))
    chosen = cells[cells["chosen"]]
    loss = chosen["eval_loss"].mean()
    second = losses.sort_values(kind="stable").iloc[1] - loss if len(chosen) and len(losses) > 1 else float("nan")
    seconds, siblings = (some["trial_seconds"].sum() / HOUR for some in (runs, runs[~runs["chosen"]]))
    *setting, candidates = key
    axes = PAIRED.join(name.removeprefix(AXIS) for name in names)
    numbers = (loss, second, primary.max() - primary.min(), len(runs), seconds, siblings)
    return (*setting, axes, candidates, _values(chosen, names), *numbers, cells["choice"].iloc[0])


def _values(chosen: pd.DataFrame, names: Iterable[str]) -> str:
    return PAIRED.join(value_text(chosen[name].iloc[0]) for name in names) if len(chosen) else ""


def choice_lines(requested: pd.DataFrame) -> list[str]:
    """What was chosen, how flat the choice was, and its price, in a few lines; none without axes."""
    table = choices_table(requested)
    grouped = table.groupby(["axes", "candidates"], sort=False)
    lines = [line for (axes, among), same in grouped for line in _lines(str(axes), str(among), same)]
    return lines + _price(requested, table) if lines else []


def _lines(axes: str, candidates: str, same: pd.DataFrame) -> Iterator[str]:
    """Of cells that have the same settings to choose from."""
    counts = Counter(same.loc[same["chosen"] != "", "chosen"])
    texts = [f"{value} in {counts[value]}" for value in candidates.split(", ")]
    waiting = int((same["not_chosen"] != "").sum())
    texts += [f"none yet in {waiting}"] if waiting else []
    named, found = axes.replace("_", " "), ", ".join(texts)
    yield f"Chosen for each of {len(same)} cells by the loss on selection examples, {named}: {found}."
    if counts:
        second, primary = (same[name].median() for name in ("second_is_higher_by", "spread_of_primary"))
        yield (
            f"  How flat the choice was, medians: the second has a loss higher by {second:.3g}, and over the settings "
            f"the primary metric spreads by {primary:.3g}."
        )


def _price(requested: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    siblings = _siblings(requested)
    return [
        f"  Choosing took {len(siblings)} runs, {siblings['trial_seconds'].sum() / HOUR:.3g} hours, that no comparison "
        f"shows: choices.csv has each of {len(table)} choices."
    ]


def _siblings(requested: pd.DataFrame) -> pd.DataFrame:
    """The finished runs that no cell chose."""
    done = requested[requested["status"] == "done"]
    return done[~done["run_id"].isin(done.loc[done["chosen"], "run_id"])].drop_duplicates("run_id")
