"""torch beside cerebras on the same cells: accuracies with the interval of their difference, rates, compile time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.rounding import UNKNOWN, rounded

KEYS = ["model", "task", "method", "sparsity", "mode", "seed"]
BACKENDS = ("torch", "cerebras")
Z_95 = 1.96


def hardware_pairs(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a cell that both backends finished: `KEYS`, each column of the summary as name_torch and name_cerebras.

    `difference` is cerebras minus torch, `half_interval` its 95% interval taken as of independent examples: both
    answer the same ones, so the true interval is narrower.
    """
    done = cells[(cells["status"] == "done") & cells["shared_with"].isna()]
    one, other = (done[done["backend"] == backend].set_index(KEYS) for backend in BACKENDS)
    pairs = one.join(other, lsuffix="_torch", rsuffix="_cerebras", how="inner").reset_index()
    pairs["difference"] = pairs["accuracy_cerebras"] - pairs["accuracy_torch"]
    pairs["half_interval"] = Z_95 * np.hypot(pairs["accuracy_stderr_torch"], pairs["accuracy_stderr_cerebras"])
    return pairs


def hardware_rows(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """The pairs in words and rounded numbers, for the page."""
    return [_row(dict(zip(pairs.columns, values, strict=True))) for values in pairs.itertuples(index=False, name=None)]


def _row(pair: dict[str, Any]) -> dict[str, Any]:
    errors = {name: pair[f"accuracy_stderr_{name}"] for name in BACKENDS}
    rates = {
        column: " / ".join(rounded(pair[f"train_{column}_per_second_{name}"]) for name in BACKENDS)
        for column in ("samples", "tokens")
    }
    half = pair["half_interval"]
    compile_seconds = [pair[f"compile_seconds_{name}"] for name in BACKENDS]
    return {
        **{name: pair[name] for name in KEYS},
        "sparsity": f"{pair['sparsity']:g}",
        **{name: rounded(pair[f"accuracy_{name}"], errors[name]) for name in BACKENDS},
        **{f"{name}_run": pair[f"run_id_{name}"] for name in BACKENDS},
        "difference": f"{rounded(pair['difference'], half / 2)} ± {rounded(half, half / 2)}",
        **rates,
        "compile": " / ".join(rounded(seconds) if pd.notna(seconds) else UNKNOWN for seconds in compile_seconds),
    }
