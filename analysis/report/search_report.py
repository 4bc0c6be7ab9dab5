"""The report of a finished search: lines, `test.csv`, pictures, and searches side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tune_sparse.files import read_json, write_text

COLUMNS = ("name", "accuracy", "parameters", "parameters_fraction", "difference_from_maximal", "low", "high")

SCOPE = (
    "  These trainings, of one seed and at one shared learning rate: paired 95% intervals over the test examples. "
    "Another seed may order them otherwise."
)
"""How far the lines of a search reach."""


def read_search(results_dir: Path, search_id: str) -> dict[str, Any]:
    """Config, result and suggestions of a finished search."""
    folder = results_dir / "searches" / search_id
    trials = [read_json(path) for path in sorted((folder / "trials").glob("*.json"))]
    return {"config": read_json(folder / "config.json"), "result": read_json(folder / "result.json"), "trials": trials}


def write_search_report(results_dir: Path, search_id: str) -> list[str]:
    """Write `test.csv` and the pictures of a finished search into its folder; returns the findings as lines."""
    from analysis.report.search_plots import draw_search

    found = read_search(results_dir, search_id)
    folder = results_dir / "searches" / search_id
    table = on_test(found)
    write_text(folder / "test.csv", table.to_csv(index=False))
    draw_search(found, folder)
    return [*summary_lines(found, table), f"Adapter: {folder / 'winner' / 'adapter'}", f"Pictures: {folder}"]


def on_test(found: dict[str, Any]) -> pd.DataFrame:
    """A row each for the winner, the heuristic, the maximal and the plain LoRA, on test examples."""
    maximal = found["config"]["maximal_parameters"]
    rows = [
        (
            name,
            row["accuracy"],
            row["parameters"],
            row["parameters"] / maximal,
            row["difference_from_maximal"],
            *row["interval_95"],
        )
        for name, row in found["result"]["test"].items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def summary_lines(found: dict[str, Any], table: pd.DataFrame) -> list[str]:
    config, result = found["config"], found["result"]
    head = (
        f"{config['model']}, {config['task']}, {config['method']} at {config['sparsity']:g}, {config['mode']}: "
        f"{result['candidates']} candidates by {config['sampler']}, {result['stopped_early']} stopped early, "
        f"{result['answered_fraction']:.0%} of the selection examples answered; {len(result['front'])} on the front."
    )
    return [head, *(_on_test_line(row) for row in table.itertuples()), SCOPE]


def _on_test_line(row: Any) -> str:
    line = f"  {row.name:10} {row.parameters_fraction:5.0%} of the parameters, test accuracy {row.accuracy:.3f}"
    if pd.isna(row.difference_from_maximal):
        return line
    return f"{line}, {row.difference_from_maximal:+.3f} against the maximal [{row.low:+.3f}, {row.high:+.3f}]"


def write_search_table(results_dir: Path, search_ids: Sequence[str]) -> list[str]:
    """Write `analysis/searches.csv`, one row a search and adapter; returns its lines."""
    tables = []
    for search_id in search_ids:
        found = read_search(results_dir, search_id)
        own = {name: found["config"][name] for name in ("model", "task", "method", "sparsity", "mode", "sampler")}
        tables.append(on_test(found).assign(search_id=search_id, **own))
    table = pd.concat(tables)
    path = results_dir / "analysis" / "searches.csv"
    path.parent.mkdir(exist_ok=True)
    write_text(path, table.to_csv(index=False))
    return [f"Comparison: {path}"]
