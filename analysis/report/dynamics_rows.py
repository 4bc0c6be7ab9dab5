"""The table of how masks ended that changed while a model trained, in words and rounded numbers for the page."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.read.dynamics import IMPOSSIBLE
from analysis.report.rounding import UNKNOWN, rounded

ROUNDED = (
    *("counted_sparsity", "score", "never_revived_share", "mean_steps_at_zero", "dead_outputs", "dead_inputs"),
    *("effective_rank", "sparsity_slope"),
)


def dynamics_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of `analysis.read.dynamics.dynamics_table`, their numbers as texts."""
    return [_row(row) for row in table.to_dict("records")]


def _row(row: dict[Any, Any]) -> dict[str, Any]:
    texts = {name: rounded(row[name]) if pd.notna(row[name]) else UNKNOWN for name in ROUNDED}
    revived = IMPOSSIBLE if pd.isna(row["revived"]) else f"{row['revived']:,.0f}"
    return row | texts | {"sparsity": f"{row['sparsity']:g}", "revived": revived}
