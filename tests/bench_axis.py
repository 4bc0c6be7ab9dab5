"""Does the learning rate change verdicts? `python tests/bench_axis.py RESULTS` reads the results folder of

    tune-sparse sweep toy --sparsities 0 0.5 0.7 --seeds 0 1 2 --results-dir RESULTS \\
        --axis learning_rate:final_learning_rate=1e-3:1e-4,3e-3:3e-4,1e-2:1e-3

and prints, as a Markdown table, every comparison of modes and of methods twice: with one shared rate for all cells
(`--rate`, 3e-3 by default, that of the preset), and with the rate chosen for each cell on selection examples. A verdict
is what tests/ call one: shown to be higher, shown to be lower, or no difference shown. Nothing is trained here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.read.chosen import compared_cells
from analysis.read.load import cells_table
from analysis.read.results import read_results
from analysis.report.choices import choice_lines
from analysis.stats.comparisons import PairedTest, Points, compare_values
from tune_sparse.config.options import value_text

RATE = "axis/learning_rate"
QUESTIONS = ("mode", "method")
Tests = dict[tuple[str, str, str, str, str], PairedTest]
"""{(question, about, scope, left, right): its test}"""


def at_one_rate(cells: pd.DataFrame, rate: float) -> pd.DataFrame:
    """The cells of one rate, as a sweep without the axis has them."""
    return cells[cells[RATE] == rate].assign(chosen=True, choice="")


def all_tests(points: Points) -> Tests:
    found = ((q, test) for q in QUESTIONS for test in compare_values(points, q, simultaneous=q == "method"))
    return {(q, t.about, t.scope.value, t.left, t.right): t for q, t in found}


def verdict(test: PairedTest) -> str:
    if not test.scope.has_verdict:
        return "described"
    return ("higher" if test.estimate.value > 0 else "lower") if test.is_shown else "not shown"


def shown(test: PairedTest) -> str:
    e = test.estimate
    return f"{e.value:+.3f} ({e.low:+.3f} to {e.high:+.3f}), {verdict(test)}"


def rows(single: Tests, tuned: Tests) -> Iterator[dict[str, Any]]:
    for key in (key for key in single if key in tuned):
        question, about, scope, left, right = key
        before, after = single[key], tuned[key]
        change = "" if verdict(before) == verdict(after) else "changed"
        what = f"{right} minus {left}"
        yield {"question": question, "about": about, "scope": scope, "what": what} | {
            "one rate": shown(before),
            "chosen": shown(after),
            "verdict": change,
        }


def as_markdown(table: pd.DataFrame) -> str:
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sweep", nargs="+", help="sweeps to read (default: all)")
    parser.add_argument("--rate", type=float, default=3e-3)
    asked = parser.parse_args()
    cells = cells_table([asked.results], asked.sweep)
    known = sorted(cells[RATE].unique())
    if asked.rate not in known:
        parser.error(f"--rate must be one of {', '.join(map(value_text, known))}, got {asked.rate:g}. Name one.")
    by_run = read_results([asked.results], asked.sweep).by_run
    predictions = {run_id: e.predictions for run_id, e in by_run.items() if e.predictions}
    single, tuned = (
        all_tests(Points(some, predictions)) for some in (at_one_rate(cells, asked.rate), compared_cells(cells))
    )
    table = pd.DataFrame(rows(single, tuned))
    print(as_markdown(table))
    decided = table["one rate"].str.contains("higher|lower|not shown")
    print(f"\nVerdicts: {int(decided.sum())}; changed by the choice: {int((table['verdict'] == 'changed').sum())}.\n")
    print("\n".join(choice_lines(cells)))


if __name__ == "__main__":
    main()
