"""A plan: the whole matrix checked before anything runs, each cell with the run that serves it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from search_spaces.matrix import cells as combinations
from tune_sparse.cerebras.conversion import refuse_unconvertible
from tune_sparse.cerebras.environment import cerebras_identity
from tune_sparse.config import SPLIT, Cell, SweepConfig
from tune_sparse.data.sources import rows_folder
from tune_sparse.data.splits import calibration_text, fingerprint_splits, load_splits
from tune_sparse.data.task_types import AnswerTask, TextTask
from tune_sparse.data.tasks import mean_chance, tasks_named
from tune_sparse.errors import InputError
from tune_sparse.identity import hash_json
from tune_sparse.ledger.lease import refuse_if_held
from tune_sparse.ledger.ledger import Ledger, Record, Run, SweepRecord, readable_id
from tune_sparse.models.checkpoints import Checkpoint, check_checkpoint, load_tokenizer, short_name
from tune_sparse.models.toy_models import TOY_MODELS
from tune_sparse.modes import MODES
from tune_sparse.pruning.calibration import text_rows
from tune_sparse.pruning.methods import METHODS, method_named
from tune_sparse.pruning.prune_model import check_sparsities

OUTCOME_BYTES = 400
"""Of one scored example besides a generated text: an outcome before and after the last mask."""
TOKEN_BYTES = 8
"""Of a generated token, kept before and after the last mask."""
RUN_BYTES = 64 * 1024
"""Of a run's other files."""


@dataclass(frozen=True)
class Plan:
    """A sweep that was found sound: its cells and the distinct runs that serve them, in the order of running."""

    config: SweepConfig
    record: SweepRecord
    runs: dict[str, Run]
    checkpoints: dict[str, Checkpoint]
    """by the models' short names"""

    def missing(self, ledger: Ledger, retry_failed: bool = False) -> list[Run]:
        """Runs that no finished record serves. A run that failed for good is missing only if `retry_failed`."""
        return [run for run in self.runs.values() if is_missing(ledger.record(run.run_id), retry_failed)]

    def estimate_bytes(self, run: Run) -> int:
        """What a run will write, roughly: mostly what it trained and its outcomes."""
        shape = self.checkpoints[run.cell.model].shape
        trained = 4 * shape.adapter_weights(run.protocol.lora_rank)
        if not MODES[run.cell.mode].has_adapter:
            trained = shape.pruned_weights * (2 if run.protocol.precision == "bfloat16" else 4)
        generates = any(isinstance(task, AnswerTask) for task in tasks_named(run.cell.task))
        outcome = OUTCOME_BYTES + TOKEN_BYTES * (run.protocol.max_new_tokens if generates else 0)
        return trained + outcome * (run.protocol.n_test or 10_000) + RUN_BYTES


def is_missing(record: Record | None, retry_failed: bool = False) -> bool:
    """Whether a run with this record has to run: it has none, was interrupted, or failed and may go well now."""
    if record is None or record.status == "interrupted":
        return True
    if record.status == "failed":
        return retry_failed or bool(record.error and record.error["retryable"])
    return False


def asked_cells(config: SweepConfig) -> list[Cell]:
    """Every cell of the matrix, ordered so that a worker rarely changes model or task, and so that two workers
    rarely need the same accuracy before tuning at once."""
    split = split_blocks(config) if config.backend == (SPLIT,) else {}
    axes = {
        "model": config.models,
        "task": config.tasks,
        "mode": config.modes,
        "method": config.methods,
        "sparsity": config.sparsities,
        "seed": config.seeds,
        "backend": config.backend,
    }
    cells = [Cell(**point) for point in combinations(axes)]
    return [replace(cell, backend=split.get((cell.model, cell.task), cell.backend)) for cell in cells]


def split_blocks(config: SweepConfig) -> dict[tuple[str, str], str]:
    """{(model, task): backend} of `--backend split`: every method and mode of a model and task on the same hardware,
    the share of Cerebras spread evenly over models and tasks."""
    share, blocks = config.cerebras.cerebras_share, product(config.models, config.tasks)
    return {block: "cerebras" if int((n + 1) * share) > int(n * share) else "torch" for n, block in enumerate(blocks)}


def distinct_trainings(config: SweepConfig) -> int:
    """How many trainings serve all cells."""
    return len({cell.trained for cell in asked_cells(config)})


def plan_sweep(config: SweepConfig) -> Plan:
    """Check the whole matrix and every input, and name every run.

    Raises `InputError` for anything that would stop a trial later: unknown names, bad weights, bad rows,
    a sparsity that structured pruning cannot reach.
    """
    check_names(config)
    tasks = {name: tasks_named(name) for name in config.tasks}
    data_dir, data = rows_folder(config.data_dir, _all_rows(config)), check_rows(config)
    checkpoints = {short_name(model): check_checkpoint(model) for model in config.models}
    cerebras = cerebras_identity(config.cerebras) if "cerebras" in config.backends else None
    model_paths = {short_name(model): _model_path(model) for model in config.models}
    for checkpoint in checkpoints.values():
        config.protocol.within(checkpoint.shape.context_tokens)
        _refuse_unreachable(config, checkpoint)
        if cerebras:
            refuse_unconvertible(checkpoint.path)
    text = _calibration_text(config, data_dir, checkpoints.values())

    def run_for(cell: Cell) -> Run:
        checkpoint = checkpoints[short_name(cell.model)]
        return Run(
            cell=replace(cell, model=checkpoint.name),
            protocol=config.protocol,
            model_path=model_paths[checkpoint.name],
            data_dir=str(data_dir) if data_dir else None,
            model_fingerprint=checkpoint.fingerprint,
            data_fingerprint=data[cell.task],
            prompt_version="+".join(str(task.prompt_version) for task in tasks[cell.task]),
            calibration_fingerprint=text,
            cerebras=cerebras if cell.backend == "cerebras" else None,
        )

    runs: dict[str, Run] = {}
    owners: dict[str, str] = {}
    rows = []
    for cell in asked_cells(config):
        asked, run = run_for(cell), run_for(cell.trained)
        cell_id = readable_id(asked.cell, asked.identity)
        runs.setdefault(run.run_id, run)
        owner = owners.setdefault(run.run_id, cell_id)
        rows.append(
            {"cell_id": cell_id, "run_id": run.run_id, "shared_with": None if owner == cell_id else owner}
            | asdict(asked.cell)
            | {"chance": mean_chance(tasks[cell.task])}
        )
    described = {name: _plain(value) for name, value in asdict(config).items()}
    sweep_id = hash_json(sorted(row["cell_id"] for row in rows))[:12]
    return Plan(config, SweepRecord(sweep_id, time.time(), described, tuple(rows)), runs, checkpoints)


def _refuse_unreachable(config: SweepConfig, checkpoint: Checkpoint) -> None:
    """Raise `InputError` for a method that cannot prune this model to a sparsity of the matrix."""
    for method in config.methods:
        try:
            check_sparsities(method, checkpoint.shape, config.sparsities)
        except InputError as error:
            raise InputError(f"{checkpoint.name}: {error}") from error


def _is_calibrated_on_text(config: SweepConfig) -> bool:
    return config.protocol.calibration != "task" and any(METHODS[method].is_calibrated for method in config.methods)


def _all_rows(config: SweepConfig) -> list[str]:
    """The tasks whose rows are read: those that are trained, and the calibration text."""
    return [*config.tasks, *([config.protocol.calibration] if _is_calibrated_on_text(config) else [])]


def _calibration_text(config: SweepConfig, data_dir: Path | None, checkpoints: Iterable[Checkpoint]) -> str | None:
    """SHA-256 of the calibration text, where one is used; every model's pieces are cut from it once, to see."""
    if not _is_calibrated_on_text(config):
        return None
    protocol = config.protocol
    text = calibration_text(protocol.calibration, data_dir)
    for checkpoint in checkpoints:
        tokens = min(protocol.calibration_tokens, checkpoint.shape.context_tokens)
        text_rows(load_tokenizer(checkpoint.path), text, protocol.calibration_rows, tokens)
    return hash_json(text)


def _model_path(reference: str) -> str:
    """What finds the same model from another working directory."""
    folder = Path(reference).expanduser()
    return reference if reference in TOY_MODELS or not folder.is_dir() else str(folder.resolve())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def check_rows(config: SweepConfig) -> dict[str, str]:
    """{task: fingerprint of its splits}; every row is read and checked."""
    folder, protocol = rows_folder(config.data_dir, config.tasks), config.protocol
    found = {name: [load_splits(task, folder, protocol) for task in tasks_named(name)] for name in config.tasks}
    if protocol.calibration == "task" and any(METHODS[method].is_calibrated for method in config.methods):
        for name, splits in found.items():
            rows = sum(len(split.train) for split in splits)
            if rows < protocol.calibration_rows and not isinstance(tasks_named(name)[0], TextTask):
                raise InputError(
                    f"calibration needs {protocol.calibration_rows} rows, {name} has {rows} training rows. "
                    "Lower calibration_rows, or raise n_train."
                )
    return {name: fingerprint_splits(splits) for name, splits in found.items()}


def check_names(config: SweepConfig) -> None:
    """Raise `InputError` for a task or method that no table has, or models that tables could not tell apart."""
    _refuse_ambiguous_names(config.models)
    for task in config.tasks:
        tasks_named(task)
    for method in config.methods:
        if method_named(method).needs_gradients and config.protocol.calibration_order == "sequential":
            raise InputError(
                f"{method} needs gradients of the whole dense model, got calibration_order sequential. "
                "Set calibration_order=dense, or leave the method out."
            )


def _refuse_ambiguous_names(references: Sequence[str]) -> None:
    named: dict[str, str] = {}
    for reference in references:
        other = named.setdefault(short_name(reference), reference)
        if other != reference:
            raise InputError(
                f"models of one sweep must differ in the last part of their names, got {other} and {reference}. "
                "Rename a folder."
            )


def check_folder(folder: Path) -> None:
    """Raise `InputError` unless the results folder can be written and is free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"the results folder must be writable, {folder} is not: {error}. Give another --results-dir."
        ) from error
    refuse_if_held(folder)


def check_disk(plan: Plan, ledger: Ledger, missing: Sequence[Run]) -> None:
    """Raise `InputError` unless the disk has room for what the missing runs will write."""
    needed, free = sum(plan.estimate_bytes(run) for run in missing), shutil.disk_usage(ledger.folder).free
    if needed > free:
        raise InputError(
            f"a sweep needs room for what it writes, about {needed / 1e9:.2f} GB, {ledger.folder} has "
            f"{free / 1e9:.2f} GB. Free some, or give another --results-dir."
        )
