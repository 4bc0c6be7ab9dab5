"""Everything that results folders hold, read once: each run with what proves it, and what could not be read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.read.imported import Imported, imported_records
from tune_sparse.errors import InputError
from tune_sparse.evaluation.metrics import judged_again, metrics_by_task
from tune_sparse.files import read_json
from tune_sparse.ledger.prunings import StoredPruning, read_pruning
from tune_sparse.ledger.record import Record, SweepRecord
from tune_sparse.ledger.run import Run, read_config


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model for each example, in the order of the questions' ids."""

    tasks: NDArray[Any]
    ids: NDArray[Any]
    scores: NDArray[np.float64]
    """by the primary metric of its task, 1 for a right answer and 0 for a wrong one; of a text, the log-likelihood of a
    token in each window"""
    predictions_sha256: str
    likelihoods_sha256: str | None
    """None where answers are generated, and have none."""

    def mean(self) -> float:
        """The accuracy; tasks of a mixture count alike."""
        return float(np.dot(self.weights, self.scores))

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weight of each example: they add up to 1."""
        _, task, count = np.unique(self.tasks, return_inverse=True, return_counts=True)
        return np.asarray(1 / count[task] / len(count))


@dataclass(frozen=True)
class RunFiles:
    """One run folder. What only a finished run has is None or empty for any other."""

    folder: Path
    record: Record
    run: Run
    sparse_config: dict[str, Any]
    validation: dict[str, Any]
    marker: dict[str, Any] | None
    """what lies beside the adapter"""
    losses: tuple[float, ...] = ()
    predictions: Predictions | None = None
    pruned_baseline: Predictions | None = None

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def pruning_folder(self) -> Path | None:
        """The stored pruning that it was trained on, which may be gone; None if its method stores none."""
        pruning_id = self.run.pruning_id
        return self.folder.parents[1] / "prunings" / pruning_id if pruning_id else None

    @property
    def is_done(self) -> bool:
        return self.record.status == "done"


@dataclass(frozen=True)
class UnreadableFile:
    """A file or folder that is no record, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Results:
    """Several results folders as one."""

    folders: tuple[Path, ...]
    sweeps: tuple[SweepRecord, ...]
    run_files: tuple[RunFiles, ...]
    unreadable: tuple[UnreadableFile, ...]
    imported: tuple[Imported, ...]
    prunings: tuple[StoredPruning, ...]
    throughputs: tuple[dict[str, Any], ...] = ()
    """what `tune-sparse throughput` measured"""

    @cached_property
    def done(self) -> list[RunFiles]:
        """One a run: of several folders that have it, the first counts."""
        return list({e.run_id: e for e in reversed(self.run_files) if e.is_done}.values())[::-1]

    @cached_property
    def by_run(self) -> dict[str, RunFiles]:
        return {e.run_id: e for e in self.done}

    @cached_property
    def cells(self) -> dict[str, dict[str, Any]]:
        """{cell_id: what the first sweep that requested it says}"""
        return {cell["cell_id"]: cell for sweep in reversed(self.sweeps) for cell in sweep.cells}


def read_results(
    folders: Sequence[Path],
    sweep_ids: Sequence[str] | None = None,
    primary_metrics: Mapping[str, str] = MappingProxyType({}),
) -> Results:
    """Read every run of the folders, or only those that the named sweeps requested. A file that cannot be read is
    listed, and raises nothing. `primary_metrics`, {task: metric}, chooses again what runs are judged by."""
    reader = _Reader(primary_metrics)
    sweeps = [sweep for folder in folders for sweep in reader.sweeps(folder)]
    chosen = [sweep for sweep in sweeps if sweep_ids is None or sweep.sweep_id in sweep_ids]
    wanted = None if sweep_ids is None else {cell["run_id"] for sweep in chosen for cell in sweep.cells}
    run_files = [e for folder in folders for e in reader.runs(folder, wanted)]
    imported = [i for folder in folders for i in reader.imported(folder)]
    prunings = [pruning for folder in folders for pruning in reader.prunings(folder)]
    throughputs = [value for folder in folders for value in reader.throughputs(folder)]
    return Results(
        tuple(folders),
        tuple(chosen),
        tuple(run_files),
        tuple(reader.unreadable),
        tuple(imported),
        tuple(prunings),
        tuple(throughputs),
    )


def is_measured_elsewhere(throughput: Mapping[str, Any]) -> bool:
    """Whether a record of `throughput` of a run of Cerebras does not say that its rates were measured there.

    Earlier versions of that command wrote the rates of torch on the machine at hand under such a run's name.
    """
    is_cerebras = str(throughput["run_id"]).startswith("cerebras_")
    return is_cerebras and throughput.get("measured_on", {}).get("backend") != "cerebras"


class _Reader:
    """Reads what it can, lists what it cannot, and keeps equal things once."""

    def __init__(self, primary_metrics: Mapping[str, str]) -> None:
        self.unreadable: list[UnreadableFile] = []
        self._primary_metrics = primary_metrics
        self._arrays: dict[tuple[Any, ...], NDArray[Any]] = {}
        self._pruned_baseline: dict[Path, Predictions] = {}

    def sweeps(self, folder: Path) -> Iterator[SweepRecord]:
        for path in sorted((folder / "sweeps").glob("*.json")):
            try:
                yield SweepRecord(**read_json(path))
            except READING_ERRORS as error:
                self._list(path, error)

    def imported(self, folder: Path) -> list[Imported]:
        try:
            return imported_records(folder)
        except InputError as error:
            self._list(folder / "imported", error)
            return []

    def prunings(self, folder: Path) -> Iterator[StoredPruning]:
        for path in sorted((folder / "prunings").glob("[!.]*")):
            try:
                stored = read_pruning(path)
            except InputError as error:
                self._list(path, error)
            else:
                assert stored is not None, "it was listed"
                yield stored

    def throughputs(self, folder: Path) -> Iterator[dict[str, Any]]:
        for path in sorted((folder / "throughput").glob("*.json")):
            try:
                yield read_json(path)
            except READING_ERRORS as error:
                self._list(path, error)

    def runs(self, folder: Path, wanted: set[str] | None) -> Iterator[RunFiles]:
        for path in sorted((folder / "runs").glob("[!.]*")):
            if wanted is not None and path.name not in wanted:
                continue
            try:
                yield self._run(path)
            except READING_ERRORS as error:
                self._list(path, error)

    def _list(self, path: Path, error: Exception) -> None:
        self.unreadable.append(UnreadableFile(path, f"{type(error).__name__}: {error}"))

    def _run(self, folder: Path) -> RunFiles:
        record = Record(**read_json(folder / "result.json"))
        run = read_config(folder)
        if record.status != "done":
            return RunFiles(folder, record, run, {}, {}, None)
        sparse_config, validation = (
            read_json(folder / name) for name in ("sparse_config.json", "validation_report.json")
        )
        for place, names in ((record.metrics, METRICS), (sparse_config, SPARSE_CONFIG), (validation, VALIDATION)):
            _check_complete(place, names)
        metrics = judged_again(record.metrics, run.cell.task, self._primary_metrics)
        judges = {task: found["primary_metric"] for task, found in metrics_by_task(metrics, run.cell.task).items()}
        return RunFiles(
            folder,
            replace(record, metrics=metrics),
            run,
            sparse_config,
            validation,
            next((read_json(path) for path in folder.glob("*/tune_sparse.json")), None),
            _losses(folder / "metrics.jsonl"),
            self._predictions(folder / "examples.parquet", judges),
            self._pruned_predictions(
                folder.parents[1] / "pruned_baselines" / f"{run.pruned_baseline_id}.parquet", judges
            ),
        )

    def _pruned_predictions(self, path: Path, judges: Mapping[str, str]) -> Predictions | None:
        if path not in self._pruned_baseline and path.exists():
            self._pruned_baseline[path] = self._predictions(path, judges)
        return self._pruned_baseline.get(path)

    def _predictions(self, path: Path, judges: Mapping[str, str]) -> Predictions:
        """judges: {task: its primary metric}"""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        by_answer = sorted(set(judges.values()) - {"perplexity"})
        names = ["task", "id", "predicted", *by_answer, "log_likelihoods"]
        with pq.ParquetFile(path) as file:
            table = file.read(names).combine_chunks()
        order = pc.sort_indices(table, [("task", "ascending"), ("id", "ascending")])
        table = table.take(order)
        likelihoods = table["log_likelihoods"].combine_chunks()
        flat = likelihoods.flatten().to_numpy(zero_copy_only=False)
        scores = _right(table, judges) if by_answer else flat.astype(float)
        return Predictions(
            self._once("tasks", table["task"].to_numpy()),
            self._once("ids", table["id"].to_numpy()),
            scores,
            _sha256("\0".join(map(str, table["predicted"].to_pylist())).encode()),
            _sha256(flat.tobytes()) if len(flat) else None,
        )

    def _once(self, kind: str, array: NDArray[Any]) -> NDArray[Any]:
        """The same array for all that are equal."""
        return self._arrays.setdefault((kind, len(array), _sha256("\0".join(array).encode())), array)


def _right(table: Any, judges: Mapping[str, str]) -> NDArray[np.float64]:
    """1 for a right answer by the metric of its task, and 0 for a wrong one."""
    tasks = table["task"].to_numpy()
    found = np.zeros(len(tasks))
    for task, metric in judges.items():
        of_task = tasks == task
        found[of_task] = table[metric].to_numpy()[of_task].astype(float)
    return found


def _reading_errors() -> tuple[type[Exception], ...]:
    import yaml

    return (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError)


READING_ERRORS = _reading_errors()
"""The errors of a file that is missing, cut short, or of another kind (pyarrow's and JSON's errors are ValueErrors)."""


METRICS = ("primary_metric", "n_examples", "actual_sparsity", "mask_sha256", "train_loss", "eval_loss")
SPARSE_CONFIG = ("mask_sha256", "actual_sparsity", "kept_by_matrix")
VALIDATION = ("all_valid", "violations", "max_abs_at_masked", "mask_sha256", "actual_sparsity", "zeros_by_matrix")


def _check_complete(place: dict[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in place]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}: it is foreign, or of an older format")


def _losses(path: Path) -> tuple[float, ...]:
    lines = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return tuple(line["train_loss"] for line in lines if "train_loss" in line)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
