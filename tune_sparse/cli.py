"""The command line. Exit status: 0 all is well, 1 it ran and found a fault, 2 bad input.

tune-sparse sweep                                  # 360 cells on embedded models, on a laptop
tune-sparse sweep smoke                            # 24 of them
tune-sparse sweep matrix --dry-run                 # what the 7B matrix would run
tune-sparse sweep --models ./my-llama --tasks boolq --data-dir ./rows --set steps=100
tune-sparse status && tune-sparse report && tune-sparse ui
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from search_spaces.matrix import PRESETS
from tune_sparse.config import Protocol, SweepConfig
from tune_sparse.errors import DISK_FULL, InputError, NotReadyError, unknown_name
from tune_sparse.tasks import TASKS

OK, FAULT, BAD_INPUT = 0, 1, 2
DEFAULT_RESULTS = SweepConfig.__dataclass_fields__["results_dir"].default


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    chosen = parser().parse_args(arguments)
    try:
        return int(chosen.command(chosen))
    except InputError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        if not any(message in str(error) for message in DISK_FULL):
            raise
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("tune-sparse: interrupted", file=sys.stderr)
        return FAULT


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="tune-sparse",
        description="How sparse can a language model be, and stay good at a task?",
        epilog=f"examples:\n{(__doc__ or '').split(chr(10), 2)[2]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    sweep = _command(commands, "sweep", _sweep, "run a matrix of pruned trainings; again to resume", _sweep_epilog())
    _add_sweep_options(sweep)
    sweep.add_argument("--dry-run", action="store_true", help="show what would run, what is done, and the forecast")
    sweep.add_argument("--retry-failed", action="store_true", help="also run what failed for good")
    sweep.add_argument("--json", action="store_true", help="print the outcome as JSON")

    prepare = _command(commands, "prepare", _prepare, "fetch or train the models of a sweep, to run offline later")
    _add_sweep_options(prepare)

    status = _command(commands, "status", _status, "done, failed, missing cells, with reasons")
    _add_results_dirs(status)
    status.add_argument("--json", action="store_true", help="print as JSON")

    report = _command(commands, "report", _report, "tables, figures and findings from the finished runs")
    _add_results_dirs(report)
    report.add_argument(
        "--sweep", nargs="+", metavar="ID", help="only these sweeps (names under sweeps/); default: all"
    )

    track = _command(commands, "track", _track, "fill or rebuild MLflow from the ledger")
    _add_results_dirs(track)
    track.add_argument("--tracking-uri", help="of MLflow; SQLite in the first results folder if not given")

    ui = _command(commands, "ui", _ui, "open MLflow on the tracked results")
    ui.add_argument("--results-dir", type=Path, default=DEFAULT_RESULTS)
    ui.add_argument("--port", type=int, default=5000)

    discard = _command(commands, "discard", _discard, "set a run aside, kept with the reason; a sweep runs it again")
    discard.add_argument("run", help="its folder's name under runs/")
    discard.add_argument("--reason", required=True)
    discard.add_argument("--results-dir", type=Path, default=DEFAULT_RESULTS)
    return root


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=epilog or f"example:\n    tune-sparse {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run)
    return command


def _sweep_epilog() -> str:
    settings = "\n".join(f"    {f.name:20} {f.metadata['help']} (default {f.default})" for f in fields(Protocol))
    return (
        f"presets: {', '.join(PRESETS)}\n\ntasks: {', '.join(TASKS)}\n\n"
        f"protocol, with --set or in the YAML file:\n{settings}\n\n"
        "example:\n    tune-sparse sweep smoke --set steps=20 --workers 2"
    )


def _add_sweep_options(command: argparse.ArgumentParser) -> None:
    """A flag for each field of `SweepConfig`, so that flags, YAML and Python have the same names."""
    command.add_argument("preset", nargs="?", default="embedded", metavar="PRESET", help="default: embedded")
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the names below; flags win")
    for f in fields(SweepConfig):
        if f.name != "protocol":
            many = {"nargs": "+"} if "tuple" in str(f.type) else {}
            flag = "--" + f.name.replace("_", "-")
            command.add_argument(flag, metavar=f.name.rstrip("s").upper(), help=f.metadata["help"], **many)  # type: ignore[arg-type]
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="of the protocol")


def _add_results_dirs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results-dir", type=Path, nargs="+", default=[DEFAULT_RESULTS], metavar="DIR")


def sweep_config(chosen: argparse.Namespace) -> SweepConfig:
    """The preset, then the YAML file, then the flags, then --set: later ones win."""
    if chosen.preset not in PRESETS:
        raise unknown_name("preset", chosen.preset, PRESETS)
    flags = {f.name: getattr(chosen, f.name) for f in fields(SweepConfig) if f.name != "protocol"}
    names = dict(PRESETS[chosen.preset]) | _yaml(chosen.config)
    names |= {name: value for name, value in flags.items() if value is not None}
    for setting in chosen.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set takes NAME=VALUE, got {setting!r}. Write --set steps=20, say.")
        names[name] = value
    return SweepConfig.from_names(names)


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
    if chosen.dry_run:
        return _dry_run(config, chosen)
    from analysis.report import write_report
    from tune_sparse.progress import duration
    from tune_sparse.sweep import run_sweep

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tune_sparse").setLevel(logging.INFO)
    outcome = run_sweep(config, chosen.retry_failed)
    complete = outcome.done == len(outcome.plan.runs)
    report = write_report([config.results_dir], [outcome.plan.record.sweep_id])
    if chosen.json:
        values = {name: getattr(outcome, name) for name in ("ran", "done", "failed", "left", "seconds", "utilisation")}
        print(json.dumps(values))
        return OK if complete else FAULT
    print("\n".join(report))
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
    return OK if complete else FAULT


def _dry_run(config: SweepConfig, chosen: argparse.Namespace) -> int:
    from tune_sparse.plan import asked_cells, check_names, distinct_trainings, forecast, plan_sweep
    from tune_sparse.progress import duration
    from tune_sparse.result import Ledger

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
            "device_seconds": expected.seconds,
            "disk_bytes": expected.disk_bytes,
        }
        lines += [f"{values['done']} done, {len(missing)} would run:", *(f"  {run.run_id}" for run in missing)]
        time = (
            f"no forecast of time for {expected.unmeasured} of them: no run of their model and task was measured here"
            if expected.seconds is None
            else f"about {duration(expected.seconds)} of device time"
        )
        lines.append(f"Forecast: {time}; at most {expected.disk_bytes / 1e6:.0f} MB of disk.")
    print(json.dumps(values) if chosen.json else "\n".join(lines))
    return OK


def _prepare(chosen: argparse.Namespace) -> int:
    config = sweep_config(chosen)
    from tune_sparse.models import prepare_models

    for reference, folder in prepare_models(config.models, report=print).items():
        print(f"{reference}: {folder}")
    return OK


def _status(chosen: argparse.Namespace) -> int:
    from analysis.load import cells_table
    from tune_sparse.holder import living_holder
    from tune_sparse.progress import duration
    from tune_sparse.result import Ledger

    folders = _existing(chosen.results_dir)
    cells = cells_table(folders)
    ledgers = [Ledger(folder) for folder in folders]
    running = {run_id for ledger in ledgers if living_holder(ledger.folder) for run_id in ledger.running()}
    cells.loc[cells["run_id"].isin(running) & (cells["status"] != "done"), "status"] = "running"
    runs = cells.drop_duplicates("run_id")
    counts, failed = cells["status"].value_counts(), runs[runs["status"] == "failed"]
    left = int((~runs["status"].isin(["done", "failed"])).sum())
    done = runs.loc[runs["status"] == "done", "run_id"]
    seconds = [r.measured["trial_seconds"] for ledger in ledgers for run_id in done if (r := ledger.record(run_id))]
    eta = left * statistics.median(seconds) / len(running) if running and seconds else None
    if chosen.json:
        reasons = dict(zip(failed["run_id"], failed["error"], strict=True))
        values = {"cells": len(cells), "by_status": counts.to_dict(), "failed": reasons, "eta_seconds": eta}
        print(json.dumps(values))
    else:
        print(f"{len(cells)} cells: " + (", ".join(f"{n} {status}" for status, n in counts.items()) or "none asked"))
        for row in failed.itertuples():
            print(f"  {row.run_id}: {row.error}")
        if eta is not None:
            print(f"about {duration(eta)} left")
    return OK if counts.index.isin(["done", "running"]).all() else FAULT


def _report(chosen: argparse.Namespace) -> int:
    from analysis.report import write_report

    print("\n".join(write_report(_existing(chosen.results_dir), chosen.sweep)))
    return OK


def _track(chosen: argparse.Namespace) -> int:
    from tune_sparse.result import Ledger
    from tune_sparse.tracking import default_uri, track_ledger

    folders = _existing(chosen.results_dir)
    uri = chosen.tracking_uri or default_uri(folders[0])
    for folder in folders:
        print(f"{track_ledger(Ledger(folder), uri)} runs of {folder} are in {uri}")
    return OK


def _ui(chosen: argparse.Namespace) -> int:
    import subprocess

    from tune_sparse.tracking import default_uri

    [folder] = _existing([chosen.results_dir])
    print(f"MLflow on {folder}: http://127.0.0.1:{chosen.port} (Ctrl-C ends it)", flush=True)
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", default_uri(folder)]
    return subprocess.call([*server, "--port", str(chosen.port)])


def _discard(chosen: argparse.Namespace) -> int:
    from tune_sparse.holder import refuse_if_held
    from tune_sparse.result import Ledger

    refuse_if_held(chosen.results_dir)
    ledger = Ledger(chosen.results_dir)
    runs = [path.name for path in (ledger.folder / "runs").glob("*")]
    if chosen.run not in runs:
        raise unknown_name("run", chosen.run, runs)
    print(f"set aside: {ledger.set_aside(chosen.run, chosen.reason)}")
    return OK


def _existing(folders: Sequence[Path]) -> list[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"a results folder must exist, {folder} does not. Run `tune-sparse sweep` first.")
    return list(folders)


if __name__ == "__main__":
    sys.exit(main())
