"""What reads or tends finished runs: status, report, track, ui, discard."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from tune_sparse.cli.browser import has_desktop, open_when_served
from tune_sparse.cli.command import DEFAULT_RESULTS, FAULT, OK, add_command, add_results_dirs, existing_folders
from tune_sparse.errors import NotReadyError, unknown_name


def add_commands(commands: Any) -> None:
    status = add_command(commands, "status", _status, "done, failed, missing cells, with reasons")
    add_results_dirs(status)
    status.add_argument("--json", action="store_true", help="print as JSON")

    report = add_command(commands, "report", _report, "tables, figures and findings from the finished runs")
    add_results_dirs(report)
    report.add_argument(
        "--sweep", nargs="+", metavar="ID", help="only these sweeps (names under sweeps/); default: all"
    )

    report.add_argument(
        "--baselines",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="published numbers to compare with, besides the built-in ones (docs/baselines.md)",
    )
    report.add_argument("--bundle", type=Path, metavar="DIR", help="a new folder for all that a paper's artifact needs")

    track = add_command(commands, "track", _track, "fill or rebuild MLflow from the ledger")
    add_results_dirs(track)
    track.add_argument(
        "--tracking-uri", help="of MLflow; default: MLFLOW_TRACKING_URI, or SQLite in the first results folder"
    )
    track.add_argument(
        "--baselines",
        type=Path,
        nargs="*",
        metavar="CSV",
        help="import published numbers too: the built-in ones, and those of these files (docs/baselines.md)",
    )

    ui = add_command(commands, "ui", _ui, "open MLflow on the tracked results")
    ui.add_argument("--results-dir", type=Path, default=DEFAULT_RESULTS)
    ui.add_argument("--port", type=int, default=5000)

    discard = add_command(commands, "discard", _discard, "set a run aside, kept with the reason; a sweep runs it again")
    discard.add_argument("run", help="its folder's name under runs/")
    discard.add_argument("--reason", required=True)
    discard.add_argument("--results-dir", type=Path, default=DEFAULT_RESULTS)


def _status(chosen: argparse.Namespace) -> int:
    from analysis.read.load import cells_table
    from tune_sparse.ledger.lease import shown_holder
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.ledger.reader import UnitedLedger
    from tune_sparse.sweep.progress import duration

    folders = existing_folders(chosen.results_dir)
    cells = cells_table(folders)
    ledgers = [Ledger(folder) for folder in folders]
    running = {run_id for ledger in ledgers if shown_holder(ledger.folder) for run_id in ledger.running()}
    cells.loc[cells["run_id"].isin(running) & (cells["status"] != "done"), "status"] = "running"
    runs = cells.drop_duplicates("run_id")
    counts, failed = cells["status"].value_counts(), runs[runs["status"] == "failed"]
    left = int((~runs["status"].isin(["done", "failed"])).sum())
    done = runs.loc[runs["status"] == "done", "run_id"]
    united = UnitedLedger(folders)
    seconds = [r.measured["trial_seconds"] for run_id in done if (r := united.record(run_id))]
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
    from analysis.report.bundle import check_bundle, write_bundle
    from analysis.report.report import write_report

    folders = existing_folders(chosen.results_dir)
    if chosen.bundle:
        check_bundle(chosen.bundle)
    try:
        report = write_report(folders, chosen.sweep, chosen.baselines)
    except NotReadyError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    print("\n".join(report.lines))
    if chosen.bundle:
        print(f"{write_bundle(folders, chosen.bundle)} files for publication: {chosen.bundle}")
    return OK if report.done and not report.faults else FAULT


def _track(chosen: argparse.Namespace) -> int:
    from tune_sparse.ledger.reader import UnitedLedger
    from tune_sparse.tracking.sync import chosen_uri, track_ledger

    folders = existing_folders(chosen.results_dir)
    uri = chosen_uri(chosen.tracking_uri, folders[0])
    published = _published(folders, chosen.baselines)
    try:
        tracked = track_ledger(UnitedLedger(folders), uri)
    except OSError as error:
        print(f"tune-sparse: MLflow at {uri} is not up to date: {error}. The same command goes on.", file=sys.stderr)
        return FAULT
    print(f"{tracked} runs of {', '.join(map(str, folders))} are in {uri}")
    if published is not None:
        from tune_sparse.tracking.baselines import track_published

        print(f"{track_published(published, uri)} published runs are in {uri}, in an experiment of their own")
    return OK


def _published(folders: list[Path], files: list[Path] | None) -> list[Any] | None:
    """The published runs to import, checked before anything is tracked."""
    if files is None:
        return None
    from analysis.baselines.published import as_runs, load_published
    from tune_sparse.ledger.ledger import Ledger

    models = {cell["model"] for folder in folders for sweep in Ledger(folder).sweeps() for cell in sweep.cells}
    return as_runs(load_published(files, models))


def _ui(chosen: argparse.Namespace) -> int:
    import subprocess

    from tune_sparse.tracking.baselines import comparison_page
    from tune_sparse.tracking.sync import default_uri

    [folder] = existing_folders([chosen.results_dir])
    page, address = comparison_page(default_uri(folder)), f"http://127.0.0.1:{chosen.port}"
    print(f"MLflow on {folder}: {address} (Ctrl-C ends it)", flush=True)
    if page:
        print(f"our best {page.ours} runs beside {page.published} published: {address}/{page.address}", flush=True)
    if page and not page.published:
        print("`tune-sparse track --baselines` imports published numbers to stand beside them", flush=True)
    server = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--backend-store-uri",
        default_uri(folder),
    ]
    with subprocess.Popen([*server, "--port", str(chosen.port)]) as process:
        try:
            if has_desktop():
                open_when_served(f"{address}/{page.address if page else ''}", address, process)
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            raise


def _discard(chosen: argparse.Namespace) -> int:
    from tune_sparse.ledger.lease import check_unlocked
    from tune_sparse.ledger.ledger import Ledger

    check_unlocked(chosen.results_dir)
    ledger = Ledger(chosen.results_dir)
    runs = [path.name for path in (ledger.folder / "runs").glob("*")]
    if chosen.run not in runs:
        raise unknown_name("run", chosen.run, runs)
    print(f"set aside: {ledger.set_aside(chosen.run, chosen.reason)}")
    return OK
