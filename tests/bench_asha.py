"""Early stopping beside the full grid: `python tests/bench_asha.py` (a table, then one JSON line; `--smoke`: four
configurations, one seed, few steps and examples).

48 configurations (6 learning rates, 4 ranks, 2 weight decays) of one pruned toy cell, 3 seeds, 1,000 test examples. A
sweep with `--stop-early loss` runs first; the same sweep without it then takes up what was stopped, which gives the
full grid. Of each seed the configuration with the lowest loss on the selection examples is chosen, among what ASHA let
finish and among all.

- steps_fraction: training steps with early stopping, over those of the full grid. Goal: at most 1/3.
- regret: test accuracy of the full grid's choice less that of ASHA's, mean over seeds, and for each seed the paired 95%
  interval on the same test examples. Goal: every interval contains 0.
- same_choice: in how many seeds both choose the same configuration.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import bench_parser, toy

from analysis.stats.paired import difference_interval
from search_spaces.matrix import TOY
from tune_sparse.config import EarlyStopping, SweepConfig
from tune_sparse.evaluation.outcomes import read_outcomes
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.sweep.driver import run_sweep
from tune_sparse.sweep.plan import Plan
from tune_sparse.sweep.preparation import prepare

AXES = {"learning_rate": "3e-4,1e-3,3e-3,5e-3,1e-2,3e-2", "lora_rank": "2,4,8,16", "weight_decay": "0,0.1"}
FULL = {"seeds": "0 1 2", "n_test": 1000, "final_learning_rate": 0, "axes": AXES}
SMOKE = {"seeds": "0", "n_test": 40, "n_selection": 16, "n_train": 64, "steps": 18, "final_learning_rate": 0}
SMOKE |= {"axes": {"learning_rate": "1e-5,3e-3", "lora_rank": "2,4"}}


@dataclass(frozen=True)
class Choice:
    """Two choices of one seed, and how they differ on test examples."""

    seed: int
    all_run: str
    asha_run: str
    regret: float
    interval: tuple[float, float]


def bench_config(smoke: bool, results: Path) -> SweepConfig:
    cell = {"models": toy("tiny-llama", smoke), "tasks": "boolq", "methods": "unstructured", "sparsities": 0.7}
    names = dict(TOY) | cell | {"modes": "sparse-to-sparse", "results_dir": results, "stop_early": "loss"}
    names.pop("learning_rate", None)
    return SweepConfig.from_names(names | (SMOKE if smoke else FULL))


def records(plan: Plan) -> dict[str, Record]:
    ledger = Ledger(plan.config.results_dir)
    found = {run_id: ledger.record(run_id) for run_id in plan.runs}
    return {run_id: record for run_id, record in found.items() if record is not None}


def trained_steps(plan: Plan, found: Mapping[str, Record]) -> int:
    stopped = {run_id: record.stopped["step"] for run_id, record in found.items() if record.stopped}
    return sum(stopped.get(run_id, run.protocol.steps) for run_id, run in plan.runs.items())


def chosen(plan: Plan, found: Mapping[str, Record], seed: int) -> str:
    """The finished run of a seed with the lowest loss on the selection examples."""
    done = [r for r in found.values() if r.status == "done" and plan.runs[r.run_id].cell.seed == seed]
    return min(done, key=lambda record: float(record.metrics["eval_loss"])).run_id


def compare(plan: Plan, asha: Mapping[str, Record], full: Mapping[str, Record], seed: int) -> Choice:
    ledger, names = Ledger(plan.config.results_dir), (chosen(plan, full, seed), chosen(plan, asha, seed))
    metric = full[names[0]].metrics["primary_metric"]
    scored = [read_outcomes(ledger.run_folder(name) / "examples.parquet") for name in names]
    pairs = [(a.is_right(metric), b.is_right(metric)) for a, b in zip(*scored, strict=True)]
    won, lost = (sum(pair == wanted for pair in pairs) for wanted in ((True, False), (False, True)))
    return Choice(seed, *names, (won - lost) / len(pairs), difference_interval(won, lost, len(pairs)))


def measure(config: SweepConfig) -> dict[str, Any]:
    plan = prepare(config)
    run_sweep(plan)
    asha = records(plan)
    whole = run_sweep(replace(plan, config=replace(config, early_stopping=EarlyStopping())))
    assert whole.is_complete, "every configuration must be trained"
    full = records(plan)
    choices = [compare(plan, asha, full, seed) for seed in config.seeds]
    for choice in choices:
        low, high = choice.interval
        print(f"seed {choice.seed}: regret {choice.regret:+.4f} [{low:+.4f}, {high:+.4f}], chosen {choice.asha_run}")
    steps = trained_steps(plan, asha)
    return {
        "trainings": len(plan.runs),
        "stopped": sum(record.status == "stopped" for record in asha.values()),
        "again": whole.ran,
        "steps_fraction": steps / sum(run.protocol.steps for run in plan.runs.values()),
        "regret": statistics.fmean(choice.regret for choice in choices),
        "intervals_with_0": sum(choice.interval[0] <= 0 <= choice.interval[1] for choice in choices),
        "same_choice": sum(choice.all_run == choice.asha_run for choice in choices),
    }


def main() -> None:
    smoke: bool = bench_parser(__doc__).parse_args().smoke
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        found = measure(bench_config(smoke, Path(folder) / "results"))
    for name, value in found.items():
        print(f"{name:18} {value:.4g}")
    print(json.dumps({"asha": found}))


if __name__ == "__main__":
    main()
