"""How long a report takes, what it needs, and how large its page is: 360 cells, and 10,000.

    python tests/bench_report.py [--cells 360 10000]

Goals: 20 s on 360 cells; 90 s and 2 GB on 10,000; the page below 10 MB. CPU seconds of this process, which a busy
machine stretches less than wall seconds. One fresh process a size, so that memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

from benchmarks import bench_parser
from sound import PROTOCOL, sound_ledger

from tune_sparse.config import Cell

SMOKE_CELLS = 24
GOALS = {360: (20.0, 2e9), 10_000: (90.0, 2e9)}


def cells() -> Iterator[Cell]:
    """Seeds vary slowest: 360 cells are one seed of the matrix's shape."""
    axes = (range(99), ("a", "b", "c", "d", "e", "f"), ("unstructured", "structured", "random"), range(10))
    for seed, model, method, tenth in product(*axes):
        for mode in ("sparse-to-dense", "sparse-to-sparse"):
            yield Cell(f"tiny-{model}", "boolq", method, tenth / 10, mode, seed, "torch")


def one(count: int) -> None:
    """Time the report on a ledger of `count` cells; prints one JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = sound_ledger(Path(folder) / "results", islice(cells(), count), replace(PROTOCOL, n_test=200))
        wall, cpu = time.perf_counter(), time.process_time()
        from analysis.report.report import write_report

        report = write_report([ledger.folder])
        spent = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        page = (ledger.folder / "analysis" / "report.html").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"cells": count, **spent, "peak_bytes": peak, "page_bytes": page, "errors": report.errors}))


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--cells", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        return one(chosen.one)
    found = []
    print(f"{'cells':>7}{'cpu s':>8}{'wall s':>8}{'GB':>7}{'page MB':>9}  goal")
    for count in [SMOKE_CELLS] if chosen.smoke else chosen.cells:
        run = subprocess.run(
            [sys.executable, __file__, "--one", str(count)], capture_output=True, text=True, check=True
        )
        found.append(json.loads(run.stdout.splitlines()[-1]))
        f, goal = found[-1], GOALS.get(count)
        goals = f"{goal[0]:g} s, {goal[1] / 1e9:g} GB" if goal else "none"
        shown = (f["cpu_seconds"], f["wall_seconds"], f["peak_bytes"] / 1e9, f["page_bytes"] / 1e6)
        print(f"{count:7}{shown[0]:8.1f}{shown[1]:8.1f}{shown[2]:7.2f}{shown[3]:9.1f}  {goals}")
    print(json.dumps({"report": found}))
    return None


if __name__ == "__main__":
    main()
