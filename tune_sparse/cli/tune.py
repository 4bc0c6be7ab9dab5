"""tune: the best settings of whole trainings."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_json
from tune_sparse.cli.settings import add_settings, given_settings, parse_settings, read_yaml
from tune_sparse.cli.sweep_options import BUDGETS, EARLY_STOPPING, add_sweep_options, sweep_config
from tune_sparse.cli.words import (
    RUN_WORDS,
    SETTINGS_IN_USE,
    files,
    methods,
    models,
    modes,
    paragraph,
    presets,
    settings,
    tasks,
    words,
)
from tune_sparse.errors import RunError
from tune_sparse.search.tuning_config import TuneConfig
from tune_sparse.search.tuning_space import space_from

GROUPS = {
    "what to train": ("models", "tasks", "methods", "sparsities", "modes", "schedules", "seeds"),
    "data and settings": ("data_dir",),
    "early stopping": EARLY_STOPPING,
    "how it runs": ("workers", "gpus_per_trial", "deterministic", "max_retries", "hang_seconds"),
    "memory": BUDGETS,
    "results": ("results_dir",),
}
OWN = ("sampler", "trials", "objectives")
OUTCOME = (
    "Each trial is an ordinary training, as `sweep` runs it: finished ones are taken from the results folder, and a "
    "sweep of the same settings finds them there. The best is chosen by the loss on the selection examples; test "
    "examples choose nothing, and the scores on them are shown for the best alone. With two objectives, every trial is "
    "best that no other beats in both. An interrupted search goes on when the same command is given again."
)


def declare(commands: Any) -> None:
    tune = add_command(
        commands,
        "tune",
        _tune,
        "search for the best settings of a whole training, such as learning rate, rank, sparsity or method",
        examples=(
            "tune --config cell.yaml --space learning_rate=log:1e-5:1e-2 lora_rank=8,16",
            "tune --config cell.yaml --space space.yaml --trials 50 --stop-early loss",
            "tune --config cell.yaml --space sparsity=0.3,0.5 --objectives loss sparsity",
        ),
        ok="every trial has a result or was stopped early, or with --dry-run, was found sound",
        fault="no trial has a result, or the search was interrupted",
        notes=[
            words("cell", *RUN_WORDS, "trial", "example", "adapter", "calibration", "results folder", "Ray"),
            paragraph(OUTCOME),
            models(trains=True, downloads=False),
            tasks(),
            files(),
            methods(),
            modes(),
            presets(SETTINGS_IN_USE),
            settings(),
        ],
    )
    groups = add_sweep_options(tune, GROUPS, "settings of training and scoring, listed below, for every trial")
    own = tune.add_argument_group("how to search")
    own.add_argument(
        "--space",
        nargs="+",
        required=True,
        metavar="NAME=VALUES",
        help="settings to search: method, sparsity, mode, schedule, or a setting of --set. VALUES are a list "
        "(8,16,32), a range (100:400) or a range on a logarithmic scale (log:1e-5:1e-2); or give a YAML file that maps "
        "names to such values. Where learning_rate is searched and final_learning_rate is not, that keeps its share "
        "of it",
    )
    add_settings(own, TuneConfig, OWN)
    own.add_argument("--dry-run", action="store_true", help="check all input and show what would be searched")
    add_json(groups["results"], "all trials, the best of them and their scores")


def tune_config(chosen: argparse.Namespace) -> TuneConfig:
    space = space_from(_space(chosen.space))
    return TuneConfig(sweep_config(chosen), space, **given_settings(chosen, TuneConfig, OWN))


def _space(given: Sequence[str]) -> dict[str, Any]:
    if len(given) == 1 and "=" not in given[0]:
        content = read_yaml("--space", Path(given[0]))
        return content if isinstance(content, dict) else {}
    return dict(parse_settings(given, "--space", "learning_rate=log:1e-5:1e-3"))


def _tune(chosen: argparse.Namespace) -> int:
    from tune_sparse.search.tuning_driver import run_tuning
    from tune_sparse.search.tuning_plan import plan_tuning, prepare_tuning
    from tune_sparse.search.tuning_result import result_lines

    config = tune_config(chosen)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tune_sparse").setLevel(logging.INFO)
    if chosen.dry_run:
        plan = plan_tuning(config)
        values = {"tune_id": plan.tune_id, "trials": config.trials, **plan.settings}
        names = ", ".join(dimension.name for dimension in config.space)
        text = f"{plan.tune_id}: {config.trials} trials over {names}; {len(plan.corners.runs)} corners are sound."
        print(json.dumps(values) if chosen.json else text)
        return OK
    try:
        found = run_tuning(prepare_tuning(config))
    except RunError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    print(json.dumps(found) if chosen.json else "\n".join(result_lines(found)))
    if found["stopped"]:
        print(f"tune-sparse: {found['stopped']}. The same command goes on.", file=sys.stderr)
    return FAULT if found["stopped"] or not found["best"] else OK
