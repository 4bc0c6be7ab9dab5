"""The entries that MLflow shows of a ledger: sweeps, trainings, searches and their candidates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tune_sparse.files import read_json
from tune_sparse.identity import hash_json
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.dynamics import DYNAMICS, read_dynamics
from tune_sparse.ledger.record import Record, SweepRecord
from tune_sparse.models.architectures import matrix_named
from tune_sparse.schedules import SCHEDULES

SWEEP_TAG = "tune_sparse.sweep_id"
RUN_TAG = "tune_sparse.run_id"
SEARCH_TAG = "tune_sparse.search_id"
CANDIDATE_TAG = "tune_sparse.candidate"
CHOSEN_TAG = "tune_sparse.chosen"
"""Of the runs of a sweep with axes: "true" if some cell chose its setting on selection examples, or else "false"."""
RECORD_TAG = "tune_sparse.record"
"""A hash of what the entry shows: when that changes, so must the entry."""
ARTIFACTS = ("config.yaml", "sparse_config.json", "result.json", "validation_report.json", "train.log", DYNAMICS)
TAG_CHARACTERS = 5000
"""The rest of a longer value is cut off: MLflow refuses it, or the database does."""
MLFLOW_STATUS = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

Point = tuple[str, float, int]
"""name, value, step"""


@dataclass(frozen=True)
class Entry:
    """A run of MLflow; times are in seconds since the epoch."""

    name: str
    tags: dict[str, str]
    started: float
    params: dict[str, Any]
    points: tuple[Point, ...] = ()
    files: tuple[Path, ...] = ()
    status: str = "FINISHED"
    ended: float | None = None
    """None for now"""


def record_hash(record: Record) -> str:
    return hash_json(asdict(record))


def search_hash(folder: Path) -> str | None:
    """Hash the result of a search; None if it has none yet."""
    path = folder / "result.json"
    return hash_json(read_json(path)) if path.exists() else None


def sweep_entry(sweep: SweepRecord) -> Entry:
    described = {name: json.dumps(value) for name, value in sweep.config.items() if name != "protocol"}
    tags = {SWEEP_TAG: sweep.sweep_id, RECORD_TAG: sweep.sweep_id}
    return Entry(f"sweep {sweep.sweep_id}", tags, sweep.started, described | {"cells": len(sweep.cells)})


def run_entry(ledger: LedgerReader, record: Record) -> Entry:
    """Describe a training with parameters, curves, metrics, environment and small files."""
    run, folder = ledger.run(record.run_id), ledger.run_folder(record.run_id)
    ended = (folder / "result.json").stat().st_mtime
    return Entry(
        name=record.run_id,
        tags=_described_by(record) | {RUN_TAG: record.run_id, RECORD_TAG: record_hash(record)},
        started=ended - record.measured.get("trial_seconds", 0.0),
        params=asdict(run.cell) | asdict(run.protocol) | SCHEDULES[run.cell.schedule].read(run.schedule_settings),
        points=(*_curves(folder), *_dynamics(folder), *_numbers(record.metrics | record.measured)),
        files=tuple(folder / name for name in ARTIFACTS if (folder / name).exists()),
        status=MLFLOW_STATUS[record.status],
        ended=ended,
    )


def search_entry(folder: Path) -> Entry:
    """Describe a finished search with its result and pictures."""
    config, found = read_json(folder / "config.json"), read_json(folder / "result.json")
    return Entry(
        name=f"search {folder.name}",
        tags={SEARCH_TAG: folder.name, RECORD_TAG: hash_json(found)},
        started=config["started"],
        params={name: value for name, value in config.items() if not isinstance(value, dict | list)},
        points=tuple(_numbers(found)),
        files=tuple(path for kind in ("json", "csv", "png") for path in sorted(folder.glob(f"*.{kind}"))),
    )


def candidate_entries(folder: Path) -> Iterator[Entry]:
    """Yield what a search tried, in its order."""
    started = read_json(folder / "config.json")["started"]
    for path in sorted((folder / "trials").glob("*.json")):
        trial = read_json(path)
        measured = {name: trial[name] for name in ("accuracy", "cost", "examples") if trial[name] is not None}
        yield Entry(
            name=f"candidate {trial['number']}",
            tags={CANDIDATE_TAG: str(trial["number"]), "state": str(trial["state"])},
            started=started,
            params=trial["ranks"],
            points=tuple(_numbers(measured)),
            status="FAILED" if trial["state"] == "failed" else "FINISHED",
        )


def _curves(folder: Path) -> Iterator[Point]:
    """Yield every point that training logged."""
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        point = json.loads(line)
        yield from ((f"step_{name}", value, point["step"]) for name, value in point.items() if name != "step")


def _dynamics(folder: Path) -> Iterator[Point]:
    """Yield what masks that changed were like at each record; of single matrices only the file tells."""
    for line in read_dynamics(folder):
        for name, value in line.items():
            kind, _, part = name.partition("/")
            if part and matrix_named(part.removesuffix(".in").removesuffix(".out")) is None:
                yield f"{kind}/{part}", float(value), line["step"]


def _numbers(values: Mapping[str, Any]) -> Iterator[Point]:
    """Yield every number, those of an inner mapping as outer_inner."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}_{inner}", number, step) for inner, number, step in _numbers(value))
        elif isinstance(value, int | float):
            yield name, float(value), 0


def _described_by(record: Record) -> dict[str, str]:
    """The texts of a record: its environment, what `accuracy` is, and its error."""
    flat = {k: v for k, v in record.environment.items() if isinstance(v, str)}
    flat |= {f"version_{name}": v for name, v in record.environment.get("packages", {}).items()}
    if "primary_metric" in record.metrics:
        flat["primary_metric"] = record.metrics["primary_metric"]
    if record.error:
        flat["error"] = f"{record.error['class']}: {record.error['message']}"[:TAG_CHARACTERS]
    return flat
