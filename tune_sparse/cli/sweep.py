"""sweep and prepare."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from search_spaces.matrix import PRESETS
from tune_sparse.cli.command import FAULT, OK, add_command, parse_settings
from tune_sparse.config import HUB_ROWS, Cerebras, Protocol, SweepConfig
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError, NotReadyError, RunError, unknown_name

NESTED = ("protocol", "cerebras")
"""Fields of `SweepConfig` that hold settings of their own."""


def add_commands(commands: Any) -> None:
    sweep = add_command(commands, "sweep", _sweep, "run a matrix of pruned trainings; again to resume", _sweep_epilog())
    add_sweep_options(sweep)
    sweep.add_argument("--dry-run", action="store_true", help="show what would run, what is done, and the forecast")
    sweep.add_argument(
        "--pilot", action="store_true", help="with --dry-run: first run one cell of what has none measured"
    )
    sweep.add_argument("--retry-failed", action="store_true", help="also run what failed for good")
    sweep.add_argument(
        "--no-report", action="store_true", help="end without audit, tables and figures; `report` writes them later"
    )
    sweep.add_argument("--json", action="store_true", help="print the outcome as JSON")

    prepare = add_command(commands, "prepare", _prepare, "fetch or train what a sweep needs, to run offline later")
    add_sweep_options(prepare)


def _sweep_epilog() -> str:
    settings = "\n".join(f"    {f.name:20} {f.metadata['help']} (default {f.default})" for f in fields(Protocol))
    return (
        f"presets: {', '.join(PRESETS)}\n\ntasks: {', '.join(TASKS)}\n\n"
        f"protocol, with --set or in the YAML file:\n{settings}\n\n"
        "example:\n    tune-sparse sweep smoke --set steps=20 --workers 2"
    )


def add_sweep_options(command: argparse.ArgumentParser) -> None:
    """A flag for each field of `SweepConfig`, so that flags, YAML and Python have the same names."""
    command.add_argument("preset", nargs="?", default="toy", metavar="PRESET", help="default: toy")
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the names below; flags win")
    for f in (*fields(SweepConfig), *fields(Cerebras)):
        if f.name not in NESTED:
            many = {"nargs": "+"} if "tuple" in str(f.type) else {}
            flag = "--" + f.name.replace("_", "-")
            command.add_argument(flag, metavar=f.name.rstrip("s").upper(), help=f.metadata["help"], **many)  # type: ignore[arg-type]
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="of the protocol")


def sweep_config(chosen: argparse.Namespace) -> SweepConfig:
    """The preset, then the YAML file, then the flags, then --set: later ones win."""
    if chosen.preset not in PRESETS:
        raise unknown_name("preset", chosen.preset, PRESETS)
    own = (f.name for f in (*fields(SweepConfig), *fields(Cerebras)) if f.name not in NESTED)
    flags = {name: getattr(chosen, name) for name in own}
    names = dict(PRESETS[chosen.preset]) | _yaml(chosen.config)
    names |= {name: value for name, value in flags.items() if value is not None}
    return SweepConfig.from_names(names | parse_settings(chosen.set))


def _yaml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config must be a readable YAML file: {error}. Mend it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must map names to values, got {content!r}. Write `steps: 20`, say.")
    return content


def _sweep(chosen: argparse.Namespace) -> int:
    config = sweep_config(chosen)
    if chosen.pilot and not chosen.dry_run:
        raise InputError("--pilot runs a few cells for a forecast, so it goes with --dry-run. Add it.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tune_sparse").setLevel(logging.INFO)
    if chosen.dry_run:
        if chosen.pilot:
            _run_pilots(config, chosen)
        return _dry_run(config, chosen)
    if "cerebras" in config.backends and config.cerebras.cerebras_target == "validate":
        return _lower(config, chosen)
    from tune_sparse.sweep.driver import run_sweep
    from tune_sparse.sweep.progress import duration

    outcome = run_sweep(config, chosen.retry_failed)
    complete = outcome.done == len(outcome.plan.runs)
    # Of a stopped one somebody awaits the end, or the disk is full; `report` writes it all the same.
    unwanted = outcome.stopped or chosen.no_report
    faults, lines = (None, []) if unwanted else _write_report(config.results_dir, outcome.plan.record.sweep_id)
    if chosen.json:
        names = ("ran", "done", "failed", "left", "stopped", "seconds", "utilisation")
        print(json.dumps({name: getattr(outcome, name) for name in names} | {"faults": faults}))
        return OK if complete and not faults else FAULT
    print("\n".join(lines))
    used = f", utilisation {outcome.utilisation:.2f}" if outcome.utilisation is not None else ""
    print(f"{outcome.ran} trainings in {duration(outcome.seconds)}{used}.")
    print(f"Look at them with `tune-sparse ui --results-dir {config.results_dir}`.")
    if not complete:
        why = outcome.stopped or "not every training succeeded"
        print(
            f"tune-sparse: {why}: {outcome.done} done, {outcome.failed} failed, {outcome.left} left. "
            "The same command resumes; `tune-sparse status` has the reasons.",
            file=sys.stderr,
        )
    return OK if complete and not faults else FAULT


def _write_report(results_dir: Path, sweep_id: str) -> tuple[int, list[str]]:
    """How many faults the audit found, and what is to be printed."""
    from analysis.report.report import write_report

    report = write_report([results_dir], [sweep_id])
    return report.faults, list(report.lines)


def _lower(config: SweepConfig, chosen: argparse.Namespace) -> int:
    """What the wafer's compiler front end says to each kind of model of a sweep; nothing is trained."""
    from tune_sparse.cerebras.preflight import lower_all
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.models.checkpoints import prepare_models
    from tune_sparse.models.toy_models import TOY_MODELS
    from tune_sparse.sweep.plan import check_folder, plan_sweep

    check_folder(config.results_dir)
    prepare_models([model for model in config.models if model in TOY_MODELS], report=print)
    plan = plan_sweep(config)
    try:
        for lowering in lower_all(config, list(plan.checkpoints.values()), Ledger(config.results_dir)):
            print(json.dumps(asdict(lowering)) if chosen.json else lowering.described(), flush=True)
    except (RunError, ConnectionError) as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    return OK


def _dry_run(config: SweepConfig, chosen: argparse.Namespace) -> int:
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.sweep.forecast import forecast
    from tune_sparse.sweep.plan import asked_cells, check_names, distinct_trainings, plan_sweep

    check_names(config)
    values: dict[str, Any] = {"cells": len(asked_cells(config)), "trainings": distinct_trainings(config)}
    lines = [f"{values['cells']} cells, {values['trainings']} distinct trainings."]
    try:
        plan = plan_sweep(config)
    except NotReadyError as error:
        values["not_ready"] = str(error)
        lines.append(f"Not ready to run: {error}")
    else:
        ledger = Ledger(config.results_dir)
        missing = plan.missing(ledger, chosen.retry_failed)
        expected = forecast(plan, ledger, missing)
        values |= {
            "done": sum(ledger.is_done(run_id) for run_id in plan.runs),
            "missing": [run.run_id for run in missing],
            "forecast": asdict(expected),
        }
        lines += [f"{values['done']} done, {len(missing)} would run:", *(f"  {run.run_id}" for run in missing)]
        lines += expected.lines()
    print(json.dumps(values) if chosen.json else "\n".join(lines))
    return OK


def _run_pilots(config: SweepConfig, chosen: argparse.Namespace) -> None:
    """Run what a forecast lacks. Their failures are said, and recorded as those of every run."""
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.models.checkpoints import prepare_models
    from tune_sparse.models.toy_models import TOY_MODELS
    from tune_sparse.sweep.driver import run_sweep
    from tune_sparse.sweep.forecast import pilots
    from tune_sparse.sweep.plan import check_names, plan_sweep

    check_names(config)
    prepare_models([model for model in config.models if model in TOY_MODELS], report=logging.getLogger(__name__).info)
    plan, ledger = plan_sweep(config), Ledger(config.results_dir)
    lacking = pilots(plan, ledger, plan.missing(ledger, chosen.retry_failed))
    if lacking:
        run_sweep(config, chosen.retry_failed, only={run.run_id for run in lacking})


def _prepare(chosen: argparse.Namespace) -> int:
    config = sweep_config(chosen)
    from tune_sparse.data.sources import fetch_rows
    from tune_sparse.models.checkpoints import prepare_models

    if config.data_dir == HUB_ROWS:
        fetch_rows(config.tasks, report=print)
    for reference, folder in prepare_models(config.models, report=print).items():
        print(f"{reference}: {folder}")
    return OK
