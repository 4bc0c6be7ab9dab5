"""torch beside cerebras on the same cells: accuracies with the interval of their difference, rates, compile time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.baselines.published import RATE, Published
from analysis.report.rounding import UNKNOWN, rounded, with_interval
from analysis.report.runs import Runs

KEYS = ["model", "task", "method", "sparsity", "mode", "schedule", "seed"]
BACKENDS = ("torch", "cerebras")
WEIGHTS = {"printed": "official", "restated": "restated", "user run": "user run", "digitised": "digitised"}
WEIGHTS |= {"log": "a run's log", "unofficial": "unofficial"}
"""{kind of a published number: how much it weighs}, the weightiest first"""


def hardware_pairs(cells: pd.DataFrame, runs: Runs) -> pd.DataFrame:
    """One row a cell that both backends finished: `KEYS`, each column of the summary as name_torch and name_cerebras.

    `difference`, `low` and `high` are of the accuracy of cerebras minus that of torch on the same examples; missing
    where these are not the same.
    """
    done = cells[(cells["status"] == "done") & cells["shared_with"].isna()]
    one, other = (done[done["backend"] == backend] for backend in BACKENDS)
    pairs = pd.merge(one, other, on=KEYS, suffixes=("_torch", "_cerebras"))
    found = [runs.difference(a, b) for a, b in zip(pairs["run_id_torch"], pairs["run_id_cerebras"], strict=True)]
    estimates = {
        name: [getattr(estimate, part) if estimate else float("nan") for estimate in found]
        for name, part in (("difference", "value"), ("low", "low"), ("high", "high"))
    }
    return pd.concat([pairs, pd.DataFrame(estimates, index=pairs.index, dtype=float)], axis=1)


def hardware_rows(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """The pairs in words and rounded numbers, for the page."""
    return [_row(dict(zip(pairs.columns, values, strict=True))) for values in pairs.itertuples(index=False, name=None)]


def published_rates(published: Sequence[Published]) -> list[dict[str, str]]:
    """Published training rates of a CS-3, the weightiest first, for the page: none was measured by us."""
    rates = [row for row in published if row.metric == RATE and row.value is not None]
    return [
        {
            "weight": WEIGHTS[row.kind],
            "model": row.model,
            "tuning": row.tuning,
            "mode": row.mode,
            "sparsity": "" if row.sparsity is None else f"{row.sparsity:g}",
            "rate": f"{row.value:g}",
            "where": f"{row.source}, {row.table}",
            "address": row.address,
            "notes": row.notes,
        }
        for row in sorted(rates, key=lambda row: list(WEIGHTS).index(row.kind))
    ]


def _row(pair: dict[str, Any]) -> dict[str, Any]:
    errors = {name: pair[f"accuracy_stderr_{name}"] for name in BACKENDS}
    rates = {
        column: " / ".join(rounded(pair[f"train_{column}_per_second_{name}"]) for name in BACKENDS)
        for column in ("examples", "tokens")
    }
    compile_seconds = [pair[f"compile_seconds_{name}"] for name in BACKENDS]
    return {
        **{name: pair[name] for name in KEYS},
        "sparsity": f"{pair['sparsity']:g}",
        **{name: rounded(pair[f"accuracy_{name}"], errors[name]) for name in BACKENDS},
        **{f"{name}_run": pair[f"run_id_{name}"] for name in BACKENDS},
        "difference": with_interval(pair["difference"], pair["low"], pair["high"]),
        **rates,
        "compile": " / ".join(rounded(seconds) if pd.notna(seconds) else UNKNOWN for seconds in compile_seconds),
    }
