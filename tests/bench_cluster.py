"""A cluster's scheduling and a large matrix: `python tests/bench_cluster.py` (a table, one JSON line; ten minutes, or
one for the small numbers of `--smoke`).

- trial_seconds: of a warm worker and a trial that does nothing, median of the first 1,000 of 10,000 through the Tuner
  of a real sweep on two workers: workers x gap between two ends. Goal: at most 50 ms.
- driver_mb: most resident memory of the driver at the end of the 10,000. Goal: under 1,500.
- makespan: an emulated cluster (two CS3 tokens, four GPU tokens), trials of known length in the worst order: all of
  the CS3 cells first, the shortest first. Ideal, the larger of (longest trial, sum / tokens) over both kinds, divided
  by the time from the first start to the last end. Goal: at least 0.9. `in_order` is without `longest_first`.
- idle: the share of that time in which a token of a kind was free while cells of its kind were left.
- plan, missing, status: of 10,080 cells that are done. Goals: a resume (plan + missing) 30 s, status 5 s.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from bench_sweep import Clock, Nothing
from benchmarks import bench_parser, toy
from factories import done_record, make_cell, make_run
from ray import tune

from search_spaces.matrix import PRESETS
from tune_sparse.config import SweepConfig
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.forecast import longest_first
from tune_sparse.sweep.plan import make_plan
from tune_sparse.sweep.ray_session import capacity, ray_session, run_trials
from tune_sparse.sweep.scheduler import ResourceQueue
from tune_sparse.sweep.sources import Listed

TOKENS = {"cerebras": ("CS3", 2), "torch": ("GPU", 4)}


@dataclass(frozen=True)
class Sizes:
    """Of the three parts."""

    trials: int = 10_000
    first: int = 1_000
    seeds: int = 28
    ideal_seconds: float = 120.0
    models: tuple[str, ...] = ("tiny-llama", "tiny-mistral")


def scheduling(sizes: Sizes) -> dict[str, float]:
    config = SweepConfig.from_names(PRESETS["toy"] | {"workers": 2})
    run, clock = make_run().as_config(), Clock()
    trials = [{"run": run, "number": n, "resources": {"CPU": 1}} for n in range(sizes.trials)]
    with ray_session(config) as workers:
        run_trials(Nothing, ResourceQueue({"torch": Listed(trials)}, dict, capacity), clock)
    gaps = [later - earlier for earlier, later in pairwise(clock.ended)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"trial_seconds": workers * statistics.median(gaps[: sizes.first]), "driver_mb": memory}


def known_lengths(ideal_seconds: float) -> list[tuple[Run, float]]:
    """Runs of both kinds, six blocks of (model, task) each, whose trials take the same time within a block."""
    rng, runs = random.Random(0), []
    for backend, (_, tokens) in TOKENS.items():
        weights = [rng.uniform(1, 6) for _ in range(6)]
        for block, weight in enumerate(weights):
            seconds = 0.1 * weight * ideal_seconds / 6
            count = round(tokens * ideal_seconds / 6 / seconds)
            for seed in range(count):
                model, task = f"model{block // 3}", ("boolq", "hellaswag", "gsm8k")[block % 3]
                cerebras = {"target": "csx", "release": "2.10.0"} if backend == "cerebras" else None
                cell = make_cell(backend=backend, model=model, task=task, seed=seed)
                runs.append((make_run(cell, cerebras=cerebras), seconds))
    return runs


def sleeping() -> type[tune.Trainable]:
    """A class that Ray sends to its workers by value: these cannot import this file."""

    class Sleep(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.trial = config["trial"]

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.trial = new_config["trial"]
            return True

        def step(self) -> dict[str, Any]:
            began = time.time()
            time.sleep(self.trial["seconds"])
            return {"done": True, "backend": self.trial["backend"], "began": began, "ended": time.time()}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

    return Sleep


class Spans(tune.Callback):
    """(kind, began, ended) of each trial."""

    def __init__(self) -> None:
        self.found: list[tuple[str, float, float]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        self.found.append((last["backend"], last["began"], last["ended"]))


def makespan(
    ordered: Callable[[Sequence[Run]], Sequence[Run]], lengths: dict[str, float], known: Mapping[str, Run]
) -> tuple[float, float]:
    """(ideal / actual, idle share) of all trials in the order that `ordered` makes of the worst one."""
    runs = sorted(known.values(), key=lambda run: (run.cell.backend, lengths[run.run_id]))
    queues = {name: [run for run in ordered(runs) if run.cell.backend == name] for name in TOKENS}

    def make_trial(run: Run) -> dict[str, Any]:
        token, _ = TOKENS[run.cell.backend]
        held = {"CPU": 1, token: 1}
        return {"seconds": lengths[run.run_id], "backend": run.cell.backend, "resources": held}

    spans = Spans()
    options = {"resources": {"CS3": 2}, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=8, num_gpus=4, **options)
    try:
        listed = {name: Listed(items) for name, items in queues.items()}
        run_trials(sleeping(), ResourceQueue(listed, make_trial, capacity), spans)
    finally:
        ray.shutdown()
    began = min(start for _, start, _ in spans.found)
    actual = max(end for *_, end in spans.found) - began
    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for kind, start, end in spans.found:
        by_kind[kind].append((start, end))
    ideal = idle = 0.0
    for kind, own in by_kind.items():
        tokens = TOKENS[kind][1]
        worked = [end - start for start, end in own]
        ideal = max(ideal, max(worked), sum(worked) / tokens)
        last_start = max(start for start, _ in own)
        busy = sum(max(0.0, min(end, last_start) - start) for start, end in own)
        idle = max(idle, 1 - busy / (tokens * (last_start - began)))
    return ideal / actual, idle


def makespans(sizes: Sizes) -> dict[str, float]:
    known = known_lengths(sizes.ideal_seconds)
    lengths = {run.run_id: seconds for run, seconds in known}
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        runs = {run.run_id: run for run, _ in known}
        measured: dict[tuple[str, str, str], Run] = {}
        for run in runs.values():  # one measured run of each block, as a pilot leaves it
            measured.setdefault((run.cell.backend, run.cell.model, run.cell.task), run)
        for run in measured.values():
            record = done_record(run)
            ledger.write_record(run, replace(record, measured={"trial_seconds": lengths[run.run_id]}))
        plan: Any = SimpleNamespace(runs=runs, checkpoints={})
        sorted_ratio, idle = makespan(lambda missing: longest_first(plan, ledger, missing), lengths, runs)
    in_order, _ = makespan(lambda missing: missing, lengths, runs)
    return {"makespan": sorted_ratio, "idle": idle, "makespan_in_order": in_order}


def growth(sizes: Sizes) -> dict[str, float]:
    """Seconds that planning, resuming and `status` take with a large ledger."""
    with tempfile.TemporaryDirectory() as folder:
        axes = {"seeds": tuple(range(sizes.seeds)), "models": sizes.models}
        config = SweepConfig.from_names(PRESETS["toy"] | axes | {"results_dir": folder})
        started = time.perf_counter()
        plan = make_plan(config)
        planned = time.perf_counter() - started
        ledger = Ledger(Path(folder))
        for run in plan.runs.values():
            ledger.write_record(run, done_record(run))
        ledger.write_sweep(plan.record)
        started = time.perf_counter()
        assert not plan.missing(ledger)
        missing = time.perf_counter() - started
        program = [sys.executable, "-m", "tune_sparse", "status", "--results-dir", folder]
        started = time.perf_counter()
        subprocess.run(program, check=True, capture_output=True, env=os.environ)
        status = time.perf_counter() - started
    cells = float(len(plan.record.cells))
    return {"cells": cells, "plan_seconds": planned, "missing_seconds": missing, "status_seconds": status}


def main() -> None:
    smoke = bench_parser(__doc__).parse_args().smoke
    models = tuple(toy(name, smoke) for name in Sizes.models)
    sizes = Sizes(20, 10, 1, 3.0, models) if smoke else Sizes(models=models)
    figures = growth(sizes) | makespans(sizes) | scheduling(sizes)
    for name, value in figures.items():
        print(f"{name:20} {value:.3f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
