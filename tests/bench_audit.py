"""How long the audit takes for 10,000 cells: files of a real run's size, written by hand, read and checked.

    python tests/bench_audit.py [CELLS] [--smoke]

Limits: 60 s and 2 GB. What takes time is reading: YAML settings, JSON records and a Parquet file of outcomes a run.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

from benchmarks import bench_parser
from sound import PROTOCOL, make_cells, sound_ledger

from analysis.audit.audit import audit
from analysis.read.results import read_results

METHODS = ("unstructured", "random", "wanda", "gradient", "taylor")
SPARSITIES = 10
SEEDS_OF_ONE_MODEL = 5
SMOKE_CELLS = 20


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("cells", type=int, nargs="?", default=10_000, metavar="CELLS")
    chosen = parser.parse_args()
    measure(SMOKE_CELLS if chosen.smoke else chosen.cells)


def measure(count: int) -> None:
    sparsities = [i / SPARSITIES for i in range(1, SPARSITIES)]
    cells = [
        cell
        for model in range(1 + count // (len(METHODS) * len(sparsities) * 2 * SEEDS_OF_ONE_MODEL))
        for seed in range(SEEDS_OF_ONE_MODEL)
        for cell in make_cells(METHODS, sparsities, model=f"model{model}", seed=seed)
    ][:count]
    with tempfile.TemporaryDirectory() as folder:
        sound_ledger(Path(folder), cells, PROTOCOL)
        wall, cpu = time.perf_counter(), time.process_time()
        results = read_results([Path(folder)])
        read = time.process_time() - cpu
        found = audit(results)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "cpu_reading": read}
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(found.summary())
    spent = f"{seconds['cpu']:.1f} s of CPU ({read:.1f} reading), {seconds['wall']:.1f} s"
    print(f"{count} cells: {spent}, {gigabytes:.2f} GB")
    print(json.dumps({"cells": count, "gigabytes": gigabytes} | seconds))


if __name__ == "__main__":
    main()
