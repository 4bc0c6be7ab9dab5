"""What a sweep costs besides training: `python tests/bench_sweep.py` (a table, then one JSON line; `--smoke`: a
few trials, cells and steps of training).

- trial_overhead: what a worker spends on a trial that does nothing, through the Tuner of a real sweep: workers x
  seconds / trials over the last three quarters of 100 trials, two workers. The ledger, progress and MLflow are not
  in it; a real sweep's printed utilisation has them. Goal: at most 50 ms.
- worker_memory: one worker's resident memory over 100 real cells (two steps each), after the first ten.
- loads: how often that worker loaded its model. Goal: once.
- help: wall time of `tune-sparse --help`, median of seven. Goal: under 0.5 s.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from benchmarks import bench_parser, toy
from ray import tune

from search_spaces.matrix import PRESETS
from tune_sparse.config import SweepConfig
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.sweep.plan import make_plan
from tune_sparse.sweep.ray_session import capacity, ray_session, run_trials
from tune_sparse.sweep.scheduler import ResourceQueue
from tune_sparse.sweep.sources import Listed

TRIALS = 100
SMOKE_TRIALS = 10


class Nothing(tune.Trainable):
    """A trial that ends at once."""

    def step(self) -> dict[str, Any]:
        return {"done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pass


class Clock(tune.Callback):
    """When each trial ended."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended.append(time.perf_counter())


def trial_overhead_seconds(trials: int) -> float:
    """Seconds that a warm worker spends on a trial which does nothing."""
    config = SweepConfig.from_names(PRESETS["toy"] | {"workers": 2})
    clock = Clock()
    queued = [{"number": i, "resources": {"CPU": 1}} for i in range(trials)]
    with ray_session(config) as workers:
        run_trials(Nothing, ResourceQueue({"torch": Listed(queued)}, dict, capacity), clock)
    warm = clock.ended[len(clock.ended) // 4 :]
    return workers * (warm[-1] - warm[0]) / (len(warm) - 1)


def worker_memory(cells: int, model: str) -> tuple[list[float], int]:
    """Resident MB after every tenth of `cells` cells in one worker, and its model loads."""
    from trainables.pipeline import run_cell
    from trainables.worker import WorkerCache

    with tempfile.TemporaryDirectory() as folder:
        few = {"steps": 2, "n_test": 40, "results_dir": folder, "models": (model,), "warmup_fraction": 0.0}
        plan = make_plan(SweepConfig.from_names(PRESETS["toy"] | few))
        worker, process, ledger = WorkerCache(), psutil.Process(), Ledger(Path(folder))
        resident = []
        for number, run in enumerate(list(plan.runs.values())[:cells], start=1):
            exhaust(run_cell(run, ledger, worker))
            if number % 10 == 0:
                resident.append(process.memory_info().rss / 1e6)
        return resident, worker.loads


def exhaust(steps: Iterable[Any]) -> None:
    for _ in steps:
        pass


def help_seconds() -> float:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tune_sparse", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(7))


def main() -> None:
    smoke = bench_parser(__doc__).parse_args().smoke
    trials = SMOKE_TRIALS if smoke else TRIALS
    resident, loads = worker_memory(trials, toy("tiny-llama", smoke))
    figures = {
        "help_seconds": help_seconds(),
        "trial_overhead_seconds": trial_overhead_seconds(trials),
        "worker_mb_after_10_cells": resident[0],
        f"worker_mb_after_{trials}_cells": resident[-1],
        "worker_mb_per_ten_cells": [round(mb, 1) for mb in resident],
        "model_loads": loads,
    }
    for name, value in figures.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
