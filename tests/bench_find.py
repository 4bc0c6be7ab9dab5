"""How many runs `--find` needs for each curve's highest passing sparsity, beside uniform ones: docs/budget.md.

    python tests/bench_find.py [RESULTS ...] [--worlds 100]

RESULTS: folders with a complete sweep each; without one, curves are made up. The planner is replayed on each ledger as
it is, and in worlds made of it: examples drawn again, cliffs shifted and trainings lucky, twice as rough, methods
permuted, trainings failed. Right is the answer of the full matrix of the same world.

Goals, in the first three families: with `--find-levels 3` within one level on 95% of the curves from 25% of the runs;
without it exact on 90% of those that are monotone, from 42%. Choosing a run among 10,080 cells: 100 ms.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import bench_parser

from tune_sparse.config.spending import FindRule
from tune_sparse.ledger.curves import KEY, Bracket, Curve, Score, bracket_of, curves_of, score_of
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.modes import SPARSE_ADAPTER_MODES
from tune_sparse.sweep.find import Finder

RULE = FindRule(0.10, None)
SHARES = (0.15, 0.25, 0.33, 0.42)
Floats = np.ndarray[Any, np.dtype[np.float64]]


def runs_of(curve: Curve) -> list[str]:
    """The dense one and those of the levels, each of one point."""
    return [*curve.dense, *(run for [run] in curve.runs)]


@dataclass(frozen=True)
class World:
    """A whole matrix, and what it says of each run."""

    curves: tuple[Curve, ...]
    scores: dict[str, Score | None]

    def brackets(self, ended: dict[str, Score | None]) -> list[Bracket]:
        return [bracket_of(curve, ended, RULE) for curve in self.curves]


@dataclass(frozen=True)
class Table:
    """The matrix that worlds are made of: right answers of each run's examples, those of one task in one order."""

    curves: tuple[Curve, ...]
    right: dict[str, Floats]
    """(examples,) of each run"""
    before_merge: dict[str, float]
    """accuracy before the last mask minus the one after it"""

    def world(self, accuracy: Callable[[Curve, int], float], lost: Callable[[], bool] = lambda: False) -> World:
        """accuracy: of a place of a curve, -1 for its dense run. lost: whether the next training fails."""
        scores = dict[str, Score | None]()
        for curve in self.curves:
            if curve.dense[0] not in scores:
                scores[curve.dense[0]] = Score(accuracy(curve, -1))
            for place, [run] in enumerate(curve.runs):
                value = accuracy(curve, place)
                before = min(1.0, value + self.before_merge[run]) if run in self.before_merge else None
                scores[run] = None if lost() else Score(value, before_merge=before)
        return World(self.curves, scores)


def read_table(folder: Path) -> Table:
    """Raises `AssertionError` where a run is not done."""
    from analysis.read.results import read_results

    results, ledger = read_results([folder]), Ledger(folder)
    curves = curves_of(cell for sweep in results.sweeps for cell in sweep.cells)
    right, before = dict[str, Floats](), dict[str, float]()
    for run in dict.fromkeys(run for curve in curves for run in runs_of(curve)):
        assert run in results.by_run, f"{run} is not done in {folder}"
        predictions, record = results.by_run[run].predictions, ledger.record(run)
        assert predictions is not None
        assert record is not None
        right[run], score = predictions.scores, score_of(record)
        if score.before_merge is not None:
            before[run] = score.before_merge - score.value
    return Table(tuple(curves), right, before)


def made_up(models: int, tasks: int, methods: int, seeds: int = 1, examples: int = 200) -> Table:
    """Curves of nine levels that fall where model, task, method and mode say in part."""
    rng, right, before, cells = np.random.default_rng(0), dict[str, Floats](), dict[str, float](), []
    for model, task, method, mode, seed in product(*map(range, (models, tasks, methods, 2, seeds))):
        cliff = 0.3 + 0.1 * model + 0.05 * task + 0.1 * method + 0.03 * mode + rng.normal(0, 0.05)
        values = ("torch", f"m{model}", f"t{task}", f"p{method}", SPARSE_ADAPTER_MODES[mode], "one-shot", seed)
        for level in (n / 10 for n in range(10)):
            run = " ".join(map(str, (*values, level) if level else ("dense", model, task, seed)))
            cells.append(dict(zip(KEY, values, strict=True)) | {"sparsity": level, "run_id": run})
            right[run] = (rng.random(examples) < 0.9 / (1 + np.exp(25 * (level - cliff)))).astype(float)
            before |= {run: 0.0} if level and not mode else {}
    return Table(tuple(curves_of(cells)), right, before)


def redrawn(table: Table, rng: np.random.Generator, levels: float = 0.0, luck: float = 0.0, **lost: Any) -> World:
    """Examples drawn again, the same for all runs of as many; each curve's cliff shifted by so many levels (standard
    deviation), each training's accuracy by its luck."""
    drawn = {size: rng.integers(size, size=size) for size in sorted({len(scores) for scores in table.right.values()})}
    means = {run: float(scores[drawn[len(scores)]].mean()) for run, scores in table.right.items()}
    shifts, dense = {curve.key: rng.normal(0, levels) if levels else 0.0 for curve in table.curves}, dict[str, float]()

    def accuracy(curve: Curve, place: int) -> float:
        runs = runs_of(curve)
        if place < 0:
            return dense.setdefault(runs[0], float(np.clip(means[runs[0]] + rng.normal(0, luck), 0, 1)))
        moved = np.interp(place + 1 - shifts[curve.key], range(len(runs)), [means[run] for run in runs])
        return float(np.clip(moved + rng.normal(0, luck), 0, 1))

    return table.world(accuracy, **lost)


def permuted(table: Table, rng: np.random.Generator) -> World:
    """Each model, task and mode has its methods renamed, so that a method says nothing of its namesakes."""
    method, groups = KEY.index("method"), dict[tuple[Any, ...], list[int]]()
    for number, curve in enumerate(table.curves):
        groups.setdefault((*curve.key[:method], *curve.key[method + 1 :]), []).append(number)
    curves = list(table.curves)
    for group in groups.values():
        for number, other in zip(group, rng.permutation(group), strict=True):
            runs = table.curves[int(other)]
            curves[number] = replace(runs, key=table.curves[number].key)
    return redrawn(replace(table, curves=tuple(curves)), rng)


def families(table: Table, rng: np.random.Generator) -> dict[str, Callable[[], World]]:
    return {
        "boot": lambda: redrawn(table, rng),
        "shift": lambda: redrawn(table, rng, levels=1.0, luck=0.02),
        "rough": lambda: redrawn(table, rng, levels=2.0, luck=0.04),
        "permuted": lambda: permuted(table, rng),
        "5% failed": lambda: redrawn(table, rng, lost=lambda: rng.random() < 0.05),
    }


def found(world: World, gap: int) -> Iterator[dict[str, Score | None]]:
    """What is known after each run."""
    finder, ended = Finder(world.curves, RULE, gap), dict[str, Score | None]()
    while run := finder.next():
        finder.started(run)
        ended[run] = world.scores[run]
        finder.ended(run, ended[run])
        yield ended


def uniform(world: World, count: int, rng: np.random.Generator) -> dict[str, Score | None]:
    """What is known of the dense runs, and of others that are drawn."""
    dense = list(dict.fromkeys(curve.dense[0] for curve in world.curves))
    others = list(dict.fromkeys(run for curve in world.curves for run in runs_of(curve)[1:]))
    drawn = rng.permutation(len(others))[: max(0, count - len(dense))]
    return {run: world.scores[run] for run in [*dense, *(others[i] for i in drawn)]}


def judged(world: World, ended: dict[str, Score | None]) -> dict[str, float]:
    """Shares of the curves: within one level, exact, exact of those that are monotone in the full matrix."""
    truth, known = world.brackets(world.scores), world.brackets(ended)
    off = np.array([abs(mine.middle - whole.low) for mine, whole in zip(known, truth, strict=True)])
    monotone = np.array([whole.is_monotone for whole in truth])
    exact = off[monotone] == 0
    return {
        "runs": len(ended) / len(world.scores),
        "within": float((off <= 1).mean()),
        "exact": float((off == 0).mean()),
        "exact of monotone": float(exact.mean()) if len(exact) else float("nan"),
        "wrong, not monotone": float(((off > 1) & ~monotone).sum()),
        "wrong, monotone": float(((off > 1) & monotone).sum()),
        "not monotone": float((~monotone).sum()),
    }


def replay(world: World, rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """{planner: how it does}"""
    shares = {f"uniform {share:.0%}": uniform(world, round(share * len(world.scores)), rng) for share in SHARES}
    rows = {name: judged(world, ended) for name, ended in shares.items()}
    for gap in (3, 1):
        counts = {round(share * len(world.scores)): share for share in SHARES}
        ended: dict[str, Score | None] = {}
        for ended in found(world, gap):
            if len(ended) in counts:
                rows[f"find-levels {gap}, {counts[len(ended)]:.0%}"] = judged(world, ended)
        rows[f"find-levels {gap}, to its end"] = judged(world, ended)
    return rows


def tables(table: Table, worlds: int) -> dict[str, dict[str, dict[str, float]]]:
    """{family: {planner: means over worlds}}"""
    rng = np.random.default_rng(0)
    whole = {run: float(scores.mean()) for run, scores in table.right.items()}
    as_is = table.world(lambda curve, place: whole[runs_of(curve)[place + 1]])
    made = {"as it is": [as_is]} | {
        name: [make() for _ in range(worlds)] for name, make in families(table, rng).items()
    }
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for family, drawn in made.items():
        each = [replay(world, rng) for world in drawn]
        for planner in sorted({name for found in each for name in found}):
            same = [row[planner] for row in each if planner in row]
            rows.setdefault(planner, {})[family] = {key: float(np.nanmean([r[key] for r in same])) for key in same[0]}
    return rows


def as_markdown(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Each entry: share of the runs; curves within one level; exact; exact of monotone ones."""
    names = list(next(iter(rows.values())))
    lines = ["| planner | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
    shown = ("runs", "within", "exact", "exact of monotone")
    for planner, by_family in rows.items():
        found = [by_family.get(name) for name in names]
        entries = [" ".join(f"{row[key]:.2f}" for key in shown) if row else "" for row in found]
        lines.append(f"| {planner} | {' | '.join(entries)} |")
    return "\n".join(lines)


def seconds_to_choose(table: Table) -> float:
    """The longest of the choices in a replay of the whole."""
    world, longest = redrawn(table, np.random.default_rng(0)), 0.0
    finder = Finder(world.curves, RULE)
    for _ in range(400):
        began = time.perf_counter()
        run = finder.next()
        longest = max(longest, time.perf_counter() - began)
        if run is None:
            break
        finder.started(run)
        finder.ended(run, world.scores[run])
    return longest


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--worlds", type=int, default=100, help="of each family")
    chosen = parser.parse_args()
    made = {str(folder): read_table(folder) for folder in chosen.results} or {"made up": made_up(2, 3, 3)}
    rows = {name: tables(table, 2 if chosen.smoke else chosen.worlds) for name, table in made.items()}
    for name, found_rows in rows.items():
        print(f"\n{name}: runs, within one level, exact, exact of monotone\n\n{as_markdown(found_rows)}")
    many = made_up(2, 3, 3) if chosen.smoke else made_up(4, 7, 6, seeds=3, examples=20)
    cells = sum(len(curve.levels) + 1 for curve in many.curves)
    longest = seconds_to_choose(many)
    print(f"\nchoosing among {cells} cells takes at most {longest * 1000:.1f} ms")
    print(json.dumps({"replay": rows, "cells": cells, "longest_choice_seconds": longest}))


if __name__ == "__main__":
    main()
