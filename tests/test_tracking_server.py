"""MLflow on a real server before a real PostgreSQL: several results folders, and both killed in mid-sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from factories import done_record, failed_record, make_cell, make_run, make_sweep, write_run
from mlflow import MlflowClient
from mlflow_server import MlflowServer, Postgres, mlflow_server, postgres
from ray_head import wait_until

from tune_sparse.cli import main
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.tracking.background import track_sweep
from tune_sparse.tracking.entries import RUN_TAG, SWEEP_TAG
from tune_sparse.tracking.sync import EXPERIMENT

pytestmark = pytest.mark.slow
RUNS_OF_A_WRITER = 200
"""More than it gets to write before the faults are over."""
PATIENCE_SECONDS = 900
FILES = ("config.yaml", "result.json", "sparse_config.json", "train.log", "validation_report.json")


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as short:  # a socket needs a short path
        os.chmod(short, 0o755)
        with postgres(Path(short) / "db") as started:
            yield started


@pytest.fixture(scope="module")
def server(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server") / "mlflow", database.uri) as started:
        yield started


def everything(client: MlflowClient) -> list[Any]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found, token = [], None
    while True:
        page = client.search_runs([experiment.experiment_id], page_token=token)
        found, token = [*found, *page], page.token
        if not token:
            return found


def numbers(values: dict[str, Any]) -> dict[str, float]:
    flat = {f"{name}_{inner}": n for name, v in values.items() if isinstance(v, dict) for inner, n in v.items()}
    return flat | {name: v for name, v in values.items() if isinstance(v, int | float)}


def assert_shows(client: MlflowClient, ledgers: list[Ledger], tmp_path: Path) -> None:
    """All that the ledgers hold is there once, number by number and file by file, and nothing else is."""
    runs = everything(client)
    parents = {run.data.tags[SWEEP_TAG]: run for run in runs if SWEEP_TAG in run.data.tags}
    sweeps = [(ledger, sweep) for ledger in ledgers for sweep in ledger.sweeps()]
    owner = {c["run_id"]: (at, sweep) for at, sweep in sweeps for c in sweep.cells if at.record(c["run_id"])}
    times = Counter(run.data.tags.get(RUN_TAG) or run.data.tags[SWEEP_TAG] for run in runs)
    assert times == dict.fromkeys([*owner, *(sweep.sweep_id for _, sweep in sweeps)], 1)
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED"}
    for run in (run for run in runs if RUN_TAG in run.data.tags):
        run_id = run.data.tags[RUN_TAG]
        ledger, sweep = owner[run_id]
        record, folder, settings = ledger.record(run_id), ledger.run_folder(run_id), ledger.run(run_id)
        assert record is not None
        assert run.data.tags["mlflow.parentRunId"] == parents[sweep.sweep_id].info.run_id
        assert run.data.params == {k: str(v) for k, v in (asdict(settings.cell) | asdict(settings.protocol)).items()}
        final = {name: value for name, value in run.data.metrics.items() if not name.startswith("step_")}
        assert final == pytest.approx(numbers(record.metrics | record.measured))
        if (folder / "metrics.jsonl").exists():
            points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            curve = client.get_metric_history(run.info.run_id, "step_train_loss")
            logged = {p["step"]: p["train_loss"] for p in points if "train_loss" in p}
            assert len(curve) == len(logged)
            assert {m.step: m.value for m in curve} == pytest.approx(logged)
        arrived = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
        present = [name for name in FILES if (folder / name).exists()]
        assert sorted(path.name for path in arrived.iterdir()) == present
        assert all((arrived / name).read_bytes() == (folder / name).read_bytes() for name in present)
        for path in arrived.iterdir():
            path.unlink()


def small_ledger(folder: Path, seeds: range) -> Ledger:
    ledger = Ledger(folder)
    ledger.write_sweep(make_sweep([make_cell(seed=seed) for seed in seeds], started=1_000.0 + seeds.start))
    return ledger


def write_until(ledger: Ledger, uri: str, over: Event) -> None:
    """A sweep whose runs end one after the other, tracked meanwhile."""
    [sweep] = ledger.sweeps()
    with track_sweep(ledger, uri, sweep) as tracker:
        for number, cell in enumerate(sweep.cells):
            run = make_run(make_cell(seed=cell["seed"]))
            write_run(ledger, run, failed_record(run, "e" * 20_000) if number % 7 == 3 else done_record(run))
            tracker.add(run.run_id)
            if over.wait(1):
                return


def test_three_folders_and_a_server_and_a_database_that_are_killed(
    database: Postgres, server: MlflowServer, llama: Path, tmp_path: Path
) -> None:
    ledgers = [small_ledger(tmp_path / str(n), range(1000 * n, 1000 * n + RUNS_OF_A_WRITER)) for n in (1, 2)]
    over = Event()
    threads = [Thread(target=write_until, args=(ledger, server.uri, over)) for ledger in ledgers]
    live, client = Ledger(tmp_path / "live"), MlflowClient(server.uri)
    arguments = ["smoke", "--models", str(llama), "--seeds", "0", "1", "2", "--tracking-uri", server.uri]
    arguments += ["--data-dir", "synthetic"]
    command = [sys.executable, "-m", "tune_sparse", "sweep", *arguments, "--results-dir", str(live.folder)]

    def ended() -> set[str]:
        return {path.name for path in (live.folder / "runs").glob("[!.]*")}

    def is_live_tracked() -> bool:
        return client.get_experiment_by_name(EXPERIMENT) is not None and any(
            run.data.tags.get(RUN_TAG) in ended() for run in everything(client)
        )

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        try:
            wait_until(ended, PATIENCE_SECONDS)
            for thread in threads:
                thread.start()
            wait_until(is_live_tracked, PATIENCE_SECONDS)
            server.kill()
            time.sleep(2)
            server.start()
            database.kill()
            time.sleep(2)
            database.start()
            assert sweep.poll() is None, "the sweep ended before the faults did"
        finally:
            over.set()
        printed, _ = sweep.communicate(timeout=PATIENCE_SECONDS)
    for thread in threads:
        thread.join()
    assert sweep.returncode in (0, 1), printed  # 1 where the audit finds an error in so small a model
    assert "is not up to date" not in printed
    assert_shows(client, [*ledgers, live], tmp_path / "files")
    kept_at = client.get_experiment_by_name(EXPERIMENT).artifact_location
    assert kept_at.startswith("mlflow-artifacts:"), "files of runs are the server's to keep"


def test_track_on_a_database_without_a_server(
    database: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, and nothing is added the second time."""
    import psycopg

    with psycopg.connect(database.uri, autocommit=True) as connection:
        connection.execute("CREATE DATABASE direct")
    uri = database.uri.replace("/postgres?", "/direct?")
    ledger = small_ledger(tmp_path / "direct", range(3))
    for seed in range(3):
        run = make_run(make_cell(seed=seed))
        write_run(ledger, run, done_record(run))
    for _ in range(2):
        assert main(["track", "--results-dir", str(ledger.folder), "--tracking-uri", uri]) == 0
        assert "3 runs of" in capsys.readouterr().out
    runs = everything(MlflowClient(uri))
    mine = {f"sweep{1_000}", *(make_run(make_cell(seed=seed)).run_id for seed in range(3))}
    names = Counter(run.data.tags.get(RUN_TAG) or run.data.tags[SWEEP_TAG] for run in runs)
    assert {name: names[name] for name in mine} == dict.fromkeys(mine, 1)


def test_server_and_database_listen_on_this_machine_only(database: Postgres, server: MlflowServer) -> None:
    assert database.process is not None
    assert server.process is not None
    for process in (database.process, server.process):
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = [c for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} <= {"127.0.0.1"}
