"""The rows of cells that count where a sweep had axes: the chosen setting of each cell, and how to say so."""

from __future__ import annotations

import pandas as pd

from analysis.read.seeds import AXIS, SETTING, axis_columns

UNDECIDED = "undecided"
"""status of a cell for which no setting is chosen yet"""
ONE_RATE = "at one shared learning rate"
"""What every comparison of methods or modes says while the rate is no axis: each may have another that suits it."""
KNOWN = ["cell_id", "run_id", "shared_with", *SETTING, "seed", "chance_accuracy", "candidates", "chosen", "choice"]
"""Columns that do not depend on which setting is chosen, for a row that stands for a cell."""


def compared_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """What is compared, averaged and drawn: of each cell the chosen setting, or where none is chosen yet a row without
    numbers that says why. Its other settings are left out; without axes nothing is."""
    is_undecided = cells["choice"] != ""
    is_first = ~cells[is_undecided].duplicated([*SETTING, "seed"]).reindex(cells.index, fill_value=True)
    rows = cells[cells["chosen"] | is_first].reset_index(drop=True)
    measured = [str(name) for name in rows if name not in KNOWN]
    rows[measured] = rows[measured].where(rows["chosen"])
    return rows.assign(
        status=rows["status"].where(rows["chosen"], UNDECIDED),
        error=rows["error"].where(rows["chosen"], rows["choice"]),
    )


def rates_words(cells: pd.DataFrame) -> str:
    """How the learning rate, and every axis, of compared cells was set: for a sentence about them."""
    tuned = [name.removeprefix(AXIS).replace("_", " ") for name in axis_columns(cells) if cells[name].notna().any()]
    if not tuned:
        return ONE_RATE
    candidates = max(cells["candidates"].dropna().unique(), key=len).split(", ")
    among = f"of {len(candidates)}: {', '.join(candidates)}"
    chosen = f"with the {' and '.join(tuned)} chosen for each cell on selection examples ({among})"
    return chosen if "learning rate" in tuned else f"{ONE_RATE}, {chosen}"
