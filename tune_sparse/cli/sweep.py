"""sweep: a matrix of pruned trainings."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_json
from tune_sparse.cli.sweep_options import BUDGETS, CEREBRAS, EARLY_STOPPING, add_axes, add_sweep_options, sweep_config
from tune_sparse.cli.words import (
    RUN_WORDS,
    SCHEDULE_SETTINGS,
    SETTINGS,
    SETTINGS_IN_USE,
    files,
    methods,
    models,
    modes,
    presets,
    schedules,
    settings,
    tasks,
    words,
)
from tune_sparse.config import SweepConfig
from tune_sparse.config.cerebras import UNTRAINED_TARGETS
from tune_sparse.errors import InputError, NotReadyError, RunError
from tune_sparse.evaluation.cards import CARDS, SHOWN, card_named

if TYPE_CHECKING:
    from tune_sparse.ledger.run import Run
    from tune_sparse.sweep.driver import SweepResult
    from tune_sparse.sweep.estimate import KindEstimate, Sizes
    from tune_sparse.sweep.plan import Plan
    from tune_sparse.sweep.points import CellAtPoint


GROUPS = {
    "what to sweep": ("models", "tasks", "methods", "sparsities", "modes", "schedules", "seeds"),
    "how much of it": ("find", "find_levels", "budget", "compare_at"),
    "data and settings": ("data_dir",),
    "how it runs": ("backend", "workers", "gpus_per_trial", "deterministic", "max_retries", "hang_seconds"),
    "early stopping": EARLY_STOPPING,
    "memory": BUDGETS,
    "results and tracking": ("results_dir", "tracking_uri"),
    "Cerebras CS-3, for --backend cerebras, both or split": CEREBRAS,
}


UNFINISHED = {True: "not every curve could be decided", False: "not every training succeeded"}
"""{whether a sweep finds: why it is not complete}"""


def declare(commands: Any) -> None:
    sweep = add_command(
        commands,
        "sweep",
        _sweep,
        "prune, fine-tune and score a model for every combination of model, task, method, sparsity, mode and schedule",
        examples=(
            "sweep smoke --set steps=20 --workers 2",
            "sweep matrix --data-dir hub --dry-run",
            "sweep --models ./my-llama --tasks boolq --data-dir ./examples --set steps=100",
            "sweep toy-seeds --axis learning_rate=1e-3,3e-3,1e-2",
        ),
        ok="every run is finished or was stopped early, or with --find every curve is decided, and the audit found no "
        "error",
        fault="a run failed, the sweep was interrupted or its budget spent before, or the audit found an error; with "
        "--dry-run, a model or examples are not there yet",
        notes=[
            words(
                *("cell", *RUN_WORDS, "trial", "example", "adapter", "calibration"),
                "results folder",
                "audit",
                "Ray",
                "MLflow",
                "CS-3",
            ),
            "The same command resumes an interrupted sweep: finished runs are never repeated.",
            models(trains=True, downloads=False),
            tasks(),
            files(),
            methods(),
            modes(),
            schedules(),
            presets(SETTINGS_IN_USE),
            settings((*SETTINGS, *SCHEDULE_SETTINGS)),
        ],
    )
    groups = add_sweep_options(sweep, GROUPS, "settings of training, scoring and schedules, listed below")
    add_axes(groups["what to sweep"])
    _add_steps_into(groups["how it runs"])
    groups["results and tracking"].add_argument(
        "--no-report",
        action="store_true",
        help="end without the audit and the report, with a table of results that no audit has marked; the command "
        "`report` writes them later",
    )
    add_json(groups["results and tracking"], "how many runs are finished, failed and left, or with --dry-run, the plan")


def _add_steps_into(group: Any) -> None:
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="run nothing, unless --pilot is given; show how many runs are finished and how many would run (their "
        "names with --json), with a forecast of their time and disk space, an estimate of memory and hours on GPUs, "
        "the price of more seeds, the settings in use, and the steps at which masks change. Where models or examples "
        "are not there yet, the estimate takes published sizes",
    )
    group.add_argument(
        "--for-gpu",
        nargs="+",
        default=SHOWN,
        metavar="GPU",
        help="GPUs for which --dry-run estimates memory and hours by a formula, which needs none of them: "
        f"{', '.join(CARDS)} (default: {' '.join(SHOWN)})",
    )
    group.add_argument(
        "--pilot",
        action="store_true",
        help="with --dry-run: first run, and record, one run (the middle one of those missing, in the order in which "
        "--dry-run lists them) for each backend, model and task without a finished run, so that the forecast rests on "
        "measured times. The presets named pilot are another thing",
    )
    group.add_argument(
        "--retry-failed",
        action="store_true",
        help="repeat the runs that failed in an earlier sweep, too (default: leave them as failed)",
    )


def _sweep(chosen: argparse.Namespace) -> int:
    config = sweep_config(chosen)
    if chosen.pilot and not chosen.dry_run:
        raise InputError("--pilot runs a few cells for a forecast, so it goes with --dry-run. Add it.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tune_sparse").setLevel(logging.INFO)
    if chosen.dry_run:
        return _dry_run(config, chosen)
    from tune_sparse.sweep.preparation import prepare

    if "cerebras" in config.backends and config.cerebras.cerebras_target in UNTRAINED_TARGETS:
        return _make_graphs(prepare(config, report=print), chosen)
    from tune_sparse.sweep.driver import run_sweep
    from tune_sparse.sweep.protocol_in_use import protocol_in_use

    result = run_sweep(prepare(config), chosen.retry_failed)
    errors, lines = _conclude(result, chosen.no_report)
    if chosen.json:
        names = ("ran", "done", "failed", "stopped_early", "left", "stopped", "spent", "seconds", "utilisation")
        curves = [curve.as_json() for curve in result.curves]
        used = {"curves": curves, "errors": errors, "protocol": asdict(protocol_in_use(config, result.plan.examples))}
        print(json.dumps({name: getattr(result, name) for name in names} | used))
    else:
        print("\n".join(lines))
        _print_result(result)
    return OK if result.is_complete and not errors else FAULT


def _conclude(result: SweepResult, no_report: bool) -> tuple[int | None, list[str]]:
    """Write the report; returns how many errors its audit found, None without an audit, and the lines to print."""
    from analysis.audit.audit import Audit
    from analysis.read.chosen import compared_cells
    from analysis.read.load import cells_table
    from analysis.report.report import write_report
    from analysis.report.result_table import MOST_LINES, result_lines

    if result.stopped:  # the user is waiting, or the disk is full
        return None, []
    folders, sweep_ids = [result.plan.config.results_dir], [result.plan.record.sweep_id]
    if no_report:
        return None, result_lines(compared_cells(cells_table(folders, sweep_ids)), Audit((), 0), MOST_LINES)
    report = write_report(folders, sweep_ids)
    return report.errors, list(report.lines)


def _print_result(result: SweepResult) -> None:
    from tune_sparse.ledger.curves import curve_lines
    from tune_sparse.sweep.progress import duration

    used = f", utilisation {result.utilisation:.2f}" if result.utilisation is not None else ""
    early = f", {result.stopped_early} stopped early" if result.stopped_early else ""
    for line in curve_lines(result.curves):
        print(line)
    print(f"{result.ran} trainings in {duration(result.seconds)}{early}{used}.")
    if result.is_complete and result.left:
        print(f"{result.left} of {len(result.plan.runs)} runs were not needed: no table or figure has them.")
    print(f"Look at them with `tune-sparse ui --results-dir {result.plan.config.results_dir}`.")
    if not result.is_complete:
        why = result.stopped or result.spent or UNFINISHED[bool(result.curves)]
        print(
            f"tune-sparse: {why}: {result.done} done, {result.failed} failed, {result.left} left. "
            "The same command resumes; `tune-sparse status` has the reasons.",
            file=sys.stderr,
        )


def _make_graphs(plan: Plan, chosen: argparse.Namespace) -> int:
    """Lower or compile the graphs of a sweep, and print what the compiler says to each; nothing is trained."""
    from tune_sparse.cerebras.preflight import compile_all, lower_all
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.sweep.graphs import plan_graphs

    config, ledger = plan.config, Ledger(plan.config.results_dir)
    planned = plan_graphs(plan)
    make = lower_all if config.cerebras.cerebras_target == "validate" else compile_all
    if not chosen.json:
        print("\n".join(planned.lines), flush=True)
    try:
        for made in make(config, plan.checkpoints, planned.distinct(plan.runs.values()), ledger):
            print(json.dumps(asdict(made)) if chosen.json else made.summary(), flush=True)
    except (RunError, ConnectionError) as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    return OK


def _dry_run(config: SweepConfig, chosen: argparse.Namespace) -> int:
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.sweep.chains import chain_lines, chains_of
    from tune_sparse.sweep.estimate import estimate, known_sizes, plan_sizes
    from tune_sparse.sweep.examples import read_examples
    from tune_sparse.sweep.plan import check_names, plan_cells, requested_points, trained_points
    from tune_sparse.sweep.planned_updates import planned_lines, planned_updates
    from tune_sparse.sweep.protocol_in_use import protocol_in_use, selection_warnings
    from tune_sparse.sweep.seed_price import seed_price

    check_names(config)
    cards = [card_named(name) for name in chosen.for_gpu]
    plan = _run_pilots(config, chosen.retry_failed) if chosen.pilot else None
    trainings: Sequence[CellAtPoint | Run] = trained_points(config)
    values: dict[str, Any] = {"cells": len(requested_points(config)), "trainings": len(trainings)}
    lines, examples = [f"{values['cells']} cells, {values['trainings']} distinct trainings."], None
    try:
        if plan is None:
            examples = read_examples(config)
            plan = plan_cells(config, examples)
    except NotReadyError as error:
        values["not_ready"] = str(error)
        lines.append(f"Not ready to run: {error}")
        sizes = known_sizes(config, examples)
    else:
        _add_forecast_into(values, lines, plan, chosen.retry_failed)
        trainings, sizes = [plan.runs[run_id] for run_id in values["missing"]], plan_sizes(plan)
    _add_estimate_into(values, lines, estimate(config, trainings, sizes, cards), sizes)
    price = seed_price(config, sizes, cards, plan, Ledger(config.results_dir))
    protocol = protocol_in_use(config, plan.examples if plan else examples)
    updates, chains = planned_updates(config), chains_of(config)
    few = selection_warnings(config, protocol.examples or {})
    values |= {"seeds": asdict(price), "protocol": asdict(protocol), "updates": [asdict(found) for found in updates]}
    values["levels"] = [[asdict(level) for level in levels] for levels in chains]
    lines += [*price.lines(), *protocol.lines(), *few, *planned_lines(updates), *chain_lines(chains)]
    print(json.dumps(values) if chosen.json else "\n".join(lines))
    return FAULT if "not_ready" in values else OK


def _add_estimate_into(values: dict[str, Any], lines: list[str], found: Sequence[KindEstimate], sizes: Sizes) -> None:
    from tune_sparse.sweep.estimate import estimate_lines

    values["estimate"] = {
        "assumed": sizes.assumed,
        "unknown": sizes.unknown,
        "by_card": [asdict(kind) for kind in found],
    }
    lines += estimate_lines(found, sizes)


def _add_forecast_into(values: dict[str, Any], lines: list[str], plan: Plan, retry_failed: bool) -> None:
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.sweep.forecast import forecast
    from tune_sparse.sweep.purchase import purchase
    from tune_sparse.sweep.wanted import check_budget

    ledger = Ledger(plan.config.results_dir)
    missing = plan.missing(ledger, retry_failed)
    expected = forecast(plan, ledger, missing)
    values |= {
        "done": sum(ledger.is_done(run_id) for run_id in plan.runs),
        "missing": [run.run_id for run in missing],
        "forecast": asdict(expected),
    }
    lines += [f"{values['done']} done, {len(missing)} would run{':' if missing else '.'}", *_counted(missing)]
    check_budget(plan, ledger, missing)
    bought = purchase(plan, ledger, missing)
    values["chosen"] = asdict(bought) if bought else None
    lines += [*expected.lines(), *(bought.lines() if bought else ())]


def _counted(missing: Sequence[Run]) -> list[str]:
    """How many runs each model and task has; their names are many, and in --json."""
    counts = Counter((run.cell.model, run.cell.task) for run in missing)
    by_model: dict[str, list[str]] = {}
    for (model, task), count in counts.items():
        by_model.setdefault(model, []).append(f"{task} {count}")
    return [f"  {model}: {', '.join(texts)}" for model, texts in by_model.items()]


def _run_pilots(config: SweepConfig, retry_failed: bool) -> Plan:
    """Run what a forecast lacks, and return the plan. Their failures are said, and recorded as those of every run."""
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.sweep.driver import run_sweep
    from tune_sparse.sweep.forecast import pilots
    from tune_sparse.sweep.preparation import prepare

    plan, ledger = prepare(config), Ledger(config.results_dir)
    lacking = pilots(plan, ledger, plan.missing(ledger, retry_failed))
    if lacking:
        run_sweep(plan, retry_failed, only={run.run_id for run in lacking})
    return plan
