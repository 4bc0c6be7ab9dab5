"""MLflow as a view of the ledger: it can be down, be late, or be rebuilt, and never has a run twice.

One parent run a sweep, one child a training, found by the tags `tune_sparse.sweep_id` and `tune_sparse.run_id`.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from tune_sparse.config import SweepConfig
from tune_sparse.paths import read_json
from tune_sparse.result import Ledger, Record, SweepRecord, sha256_of

logger = logging.getLogger(__name__)

EXPERIMENT = "tune-sparse"
SWEEP_TAG = "tune_sparse.sweep_id"
RUN_TAG = "tune_sparse.run_id"
SEARCH_TAG = "tune_sparse.search_id"
COMPLETE_TAG = "tune_sparse.complete"
"""What was logged in full: a hash of the record. Without it a run was cut off in the middle of logging."""
ARTIFACTS = ("config.yaml", "sparse_config.json", "result.json", "validation_report.json", "train.log")
BATCH = 1000
"""Metrics in one call, MLflow's limit."""
MLFLOW_STATUS = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


def tracking_uri(config: SweepConfig) -> str:
    """Of the configuration, or SQLite in the results folder."""
    return config.tracking_uri or default_uri(config.results_dir)


def default_uri(results_dir: Path) -> str:
    return f"sqlite:///{results_dir.resolve() / 'mlflow.db'}"


def client_of(uri: str) -> Any:
    """A client of one store that says nothing while it makes its tables."""
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def every_run(client: Any, experiment: str) -> list[Any]:
    """The runs of an experiment that are not deleted."""
    runs, token = [], None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


class Tracker:
    """Writes finished runs of one ledger to one MLflow store. What is already there in full is left alone."""

    def __init__(self, ledger: Ledger, uri: str) -> None:
        self._ledger = ledger
        self._client = client_of(uri)
        self._experiment = self._experiment_id()
        self._runs: dict[tuple[str, str], Any] = {}
        self._read_existing()

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        artifacts = (self._ledger.folder / "mlartifacts").resolve()
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=artifacts.as_uri()))

    def _read_existing(self) -> None:
        for run in every_run(self._client, self._experiment):
            for tag in (SWEEP_TAG, RUN_TAG, SEARCH_TAG):
                if tag in run.data.tags:
                    self._runs[tag, run.data.tags[tag]] = run

    def track_sweep(self, sweep: SweepRecord) -> str:
        """The parent run of a sweep, made if missing; returns its MLflow id."""
        key = (SWEEP_TAG, sweep.sweep_id)
        known = self._runs.get(key)
        if known is not None and COMPLETE_TAG not in known.data.tags:
            self._client.delete_run(known.info.run_id)
            known = None
        if known is None:
            run = self._client.create_run(
                self._experiment,
                start_time=int(sweep.started * 1000),
                run_name=f"sweep {sweep.sweep_id}",
                tags={SWEEP_TAG: sweep.sweep_id},
            )
            described = {name: json.dumps(value) for name, value in sweep.config.items() if name != "protocol"}
            self._log_params(run.info.run_id, described | {"cells": str(len(sweep.cells))})
            self._client.set_tag(run.info.run_id, COMPLETE_TAG, "done")
            self._client.set_terminated(run.info.run_id)
            self._runs[key] = self._client.get_run(run.info.run_id)
        return str(self._runs[key].info.run_id)

    def track_run(self, run_id: str, parent: str) -> bool:
        """The child run of a training, with parameters, curves, metrics, environment and small artifacts.

        A child whose record has changed is replaced, one whose record is gone is removed. Returns whether there
        is a record.
        """
        record, key = self._ledger.record(run_id), (RUN_TAG, run_id)
        complete = sha256_of(asdict(record)) if record else None
        known = self._runs.get(key)
        if known is not None and known.data.tags.get(COMPLETE_TAG) == complete:
            return True
        if known is not None:
            self._client.delete_run(known.info.run_id)
            del self._runs[key]
        if record is None:
            return False
        run = self._ledger.run(run_id)
        folder = self._ledger.run_folder(run_id)
        ended = (folder / "result.json").stat().st_mtime
        start = ended - record.measured.get("trial_seconds", 0.0)
        tags = {RUN_TAG: run_id, "mlflow.parentRunId": parent}
        child = self._client.create_run(self._experiment, int(start * 1000), tags, run_id)
        id_ = child.info.run_id
        self._log_params(id_, asdict(run.cell) | asdict(run.protocol))
        self._log_metrics(id_, _curves(folder) + _finals(record), int(ended * 1000))
        for name in ARTIFACTS:
            if (folder / name).exists():
                self._client.log_artifact(id_, str(folder / name))
        for tag, value in _environment_tags(record).items():
            self._client.set_tag(id_, tag, value)
        self._client.set_tag(id_, COMPLETE_TAG, complete)
        self._client.set_terminated(id_, MLFLOW_STATUS[record.status], end_time=int(ended * 1000))
        self._runs[key] = self._client.get_run(id_)
        return True

    def track_search(self, folder: Path) -> bool:
        """The parent run of a finished search with its result and pictures, and a child for each candidate.

        A search whose result has changed is replaced. Returns whether it has a result.
        """
        if not (folder / "result.json").exists():
            return False
        config, found = read_json(folder / "config.json"), read_json(folder / "result.json")
        key, complete = (SEARCH_TAG, folder.name), sha256_of(found)
        known = self._runs.get(key)
        if known is not None and known.data.tags.get(COMPLETE_TAG) == complete:
            return True
        if known is not None:
            mine = f"tags.`mlflow.parentRunId` = '{known.info.run_id}'"
            for child in self._client.search_runs([self._experiment], mine, max_results=10_000):
                self._client.delete_run(child.info.run_id)
            self._client.delete_run(known.info.run_id)
        started, tags = int(config["started"] * 1000), {SEARCH_TAG: folder.name}
        parent = self._client.create_run(self._experiment, started, tags, f"search {folder.name}")
        id_ = parent.info.run_id
        described = {name: value for name, value in config.items() if not isinstance(value, dict | list)}
        self._log_params(id_, described)
        self._log_metrics(id_, [(name, value, 0) for name, value in _flat(found)], started)
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.csv"), *folder.glob("*.png")]):
            self._client.log_artifact(id_, str(path))
        for path in sorted((folder / "trials").glob("*.json")):
            self._track_candidate(read_json(path), id_, started)
        self._client.set_tag(id_, COMPLETE_TAG, complete)
        self._client.set_terminated(id_)
        self._runs[key] = self._client.get_run(id_)
        return True

    def _track_candidate(self, trial: dict[str, Any], parent: str, started: int) -> None:
        tags = {"mlflow.parentRunId": parent, "state": str(trial["state"])}
        id_ = self._client.create_run(self._experiment, started, tags, f"candidate {trial['number']}").info.run_id
        self._log_params(id_, trial["ranks"])
        measured = {name: trial[name] for name in ("accuracy", "cost", "examples") if trial[name] is not None}
        self._log_metrics(id_, [(name, value, 0) for name, value in _flat(measured)], started)
        self._client.set_terminated(id_, "FAILED" if trial["state"] == "failed" else "FINISHED")

    def _log_params(self, run_id: str, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(run_id, params=[Param(name, str(value)) for name, value in params.items()])

    def _log_metrics(self, run_id: str, points: list[tuple[str, float, int]], timestamp: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, timestamp, step) for name, value, step in points]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _curves(folder: Path) -> list[tuple[str, float, int]]:
    """(name, value, step) of every point that training logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    points = [json.loads(line) for line in lines]
    return [(f"step_{name}", value, p["step"]) for p in points for name, value in p.items() if name != "step"]


def _finals(record: Record) -> list[tuple[str, float, int]]:
    return [(name, value, 0) for name, value in _flat(record.metrics | record.measured)]


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number, those of an inner mapping as outer_inner."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}_{inner}", number) for inner, number in _flat(value))
        elif isinstance(value, int | float):
            yield name, float(value)


def _environment_tags(record: Record) -> dict[str, str]:
    flat = {k: v for k, v in record.environment.items() if isinstance(v, str)}
    flat |= {f"version_{name}": v for name, v in record.environment.get("packages", {}).items()}
    if record.error:
        flat["error"] = f"{record.error['class']}: {record.error['message']}"
    return flat


def _runs_of(sweep: SweepRecord) -> list[str]:
    return list(dict.fromkeys(cell["run_id"] for cell in sweep.cells))


def track_ledger(ledger: Ledger, uri: str) -> int:
    """Bring MLflow up to date with the whole ledger; returns how many recorded runs it now shows."""
    tracker = Tracker(ledger, uri)
    tracked: set[str] = set()
    for sweep in ledger.sweeps():
        parent = tracker.track_sweep(sweep)
        for run_id in _runs_of(sweep):
            if run_id not in tracked and tracker.track_run(run_id, parent):
                tracked.add(run_id)
    for folder in ledger.searches():
        tracker.track_search(folder)
    return len(tracked)


def track_search(ledger: Ledger, uri: str, search_id: str) -> None:
    """Bring MLflow up to date with one search. A store that is down is reported: `tune-sparse track` fills it later."""
    try:
        Tracker(ledger, uri).track_search(ledger.folder / "searches" / search_id)
    except Exception as error:
        _warn_of(uri, error)


def _warn_of(uri: str, error: Exception) -> None:
    logger.warning(
        "MLflow at %s is not up to date (%s: %s). The ledger is; `tune-sparse track` fills MLflow later.",
        uri,
        type(error).__name__,
        str(error).partition("\n")[0],
    )


class BackgroundTracker:
    """Tracks runs in a thread while a sweep goes on, and the whole ledger when it ends.

    A store that is down slows and stops nothing: it is reported once, and `tune-sparse track` fills it later.
    """

    def __init__(self, ledger: Ledger, uri: str, sweep_id: str) -> None:
        self._ledger, self._uri, self._sweep_id = ledger, uri, sweep_id
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)

    def add(self, run_id: str) -> None:
        self._queue.put(run_id)

    def __enter__(self) -> BackgroundTracker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        # MLflow's imports wait for the first result, so that they do not slow the start of the workers.
        first = self._queue.get()
        try:
            tracker = Tracker(self._ledger, self._uri)
            [sweep] = [sweep for sweep in self._ledger.sweeps() if sweep.sweep_id == self._sweep_id]
            parent = tracker.track_sweep(sweep)
            for run_id in chain([first], iter(self._queue.get, None)) if first else ():
                tracker.track_run(run_id, parent)
            for run_id in _runs_of(sweep):
                tracker.track_run(run_id, parent)
        except Exception as error:
            _warn_of(self._uri, error)
