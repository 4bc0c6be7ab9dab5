"""Prepare a sweep on Cerebras, once: end left-overs, convert models, lower each kind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tune_sparse.cerebras import appliance
from tune_sparse.cerebras.conversion import cerebras_name, to_cerebras
from tune_sparse.cerebras.environment import SiteEnvironment, check_cluster, find_environment
from tune_sparse.cerebras.failures import classify_failure
from tune_sparse.cerebras.guard import (
    STOP_SECONDS,
    WORKING_FILES,
    SupervisedProcess,
    is_guarded,
    keep_checkpoint,
    remove_files,
)
from tune_sparse.cerebras.job import CHILD, job_appliance, job_protocol
from tune_sparse.config import Cerebras, Protocol, SweepConfig
from tune_sparse.files import read_json, write_json
from tune_sparse.identity import hash_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.architectures import matrix_named, pruned_weights
from tune_sparse.models.checkpoints import Checkpoint
from tune_sparse.models.safetensors_io import TensorFiles, weight_files
from tune_sparse.modes import DENSE, MODES

POLL_SECONDS = 0.2
CHECKPOINT_BYTES = 8
"""A weight's bytes on disk while a training runs: float32 where it begins, and in its last checkpoint."""


@dataclass(frozen=True)
class Lowering:
    """The result of lowering one kind of model with the compiler's front end."""

    model: str
    mode: str
    precision: str
    seconds: float
    peak_memory_bytes: int
    sparsity_annotations: int
    sparse_matrices: int

    def summary(self) -> str:
        return (
            f"{self.model} {self.mode} {self.precision}: lowered in {self.seconds:.0f} s with "
            f"{self.peak_memory_bytes / 1e9:.1f} GB, {self.sparsity_annotations} sparsity annotations for "
            f"{self.sparse_matrices} pruned matrices"
        )


def prepare_cerebras(
    config: SweepConfig, checkpoints: Sequence[Checkpoint], ledger: Ledger, report: Callable[[str], None]
) -> None:
    """Make a results folder, that the caller has locked, and its models ready to train on Cerebras.

    Before a csx sweep each kind of model is lowered once. Raises `InputError` or `RunError` for what would stop every
    trial.
    """
    environment = find_environment()
    for problem in end_leftovers(ledger, config.cerebras):
        report(problem)
    for checkpoint in checkpoints:
        to_cerebras(checkpoint.path, checkpoint.fingerprint, environment)
    if config.cerebras.cerebras_target == "csx":
        check_cluster()
        for lowering in lower_all(config, checkpoints, ledger):
            report(lowering.summary())


def end_leftovers(ledger: Ledger, settings: Cerebras) -> Iterator[str]:
    """End what an earlier sweep of this results folder left: trainings, their large files, and jobs on the appliance.

    Yields which jobs were found, and what could not be made sure of.
    """
    folders = [path for path in (ledger.folder / "cerebras").glob("*") if path.is_dir()]
    for folder in folders:
        (folder / "stop").touch()
    deadline = time.monotonic() + 3 * STOP_SECONDS
    while any(is_guarded(folder) for folder in folders) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for folder in folders:
        keep_checkpoint(folder)
        remove_files(folder, WORKING_FILES)
    if settings.cerebras_target == "csx":
        left = appliance.cancel(appliance.results_label(hash_json(str(ledger.folder.resolve()))))
        if left.found or left.problem:
            yield f"jobs of an earlier sweep on the appliance: {left.summary()}"


def lower_all(config: SweepConfig, checkpoints: Sequence[Checkpoint], ledger: Ledger) -> Iterator[Lowering]:
    """Lower each distinct (model, mode, precision) of a sweep. Raises `RunError` that names what has no lowering."""
    environment, precision = find_environment(), config.protocol.precision
    for checkpoint in checkpoints:
        protocol = config.protocol.within(checkpoint.dims.max_positions)
        converted = to_cerebras(checkpoint.path, checkpoint.fingerprint, environment)
        for mode in trained_modes(config):
            shapes = matrix_shapes(checkpoint.path) if MODES[mode].is_pruned else {}
            folder = ledger.folder / "cerebras" / f"lowering_{checkpoint.name}_{mode}_{precision}"
            report = lower(folder, converted.config, shapes, mode, max(config.sparsities), protocol, environment)
            yield Lowering(
                checkpoint.name,
                mode,
                precision,
                report["seconds"],
                report["peak_memory_bytes"],
                report["sparsity_annotations"],
                len(shapes),
            )


def trained_modes(config: SweepConfig) -> list[str]:
    """List the modes that are trained: at sparsity 0 every mode is the dense one."""
    pruned = [mode for mode in config.modes if MODES[mode].is_pruned]
    has_dense = 0 in config.sparsities or len(pruned) < len(config.modes)
    return ([DENSE] if has_dense else []) + (pruned if any(config.sparsities) else [])


def lower(
    folder: Path,
    model_config: Path,
    shapes: dict[str, tuple[int, ...]],
    mode: str,
    sparsity: float,
    protocol: Protocol,
    environment: SiteEnvironment,
) -> dict[str, Any]:
    """Lower one kind of model in `folder`; returns the child's report. shapes: of the pruned matrices, (O, I)."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "examples").mkdir(parents=True)
    examples = torch.zeros(1, 3, protocol.max_tokens - 1, dtype=torch.int32)
    order = torch.zeros(protocol.global_batch_size, dtype=torch.long)
    save_file({"examples": examples, "order": order}, folder / "examples" / "tokens.safetensors")
    kind = {
        "update_is_masked": MODES[mode].masks_update,
        "sparsity_by_weight": {cerebras_name(name): sparsity for name in shapes},
        "examples": str((folder / "examples").resolve()),
    }
    one_step = {"steps": 1, "warmup_steps": 0, "checkpoint_steps": None, "restart": None}
    job = kind | job_protocol(protocol, 0) | one_step | job_appliance(Cerebras(cerebras_target="validate"), [])
    write_json(folder / "job.json", job)
    write_json(folder / "base.json", {"config": str(model_config)})
    command = [str(environment.python), str(CHILD), str(folder.resolve())]
    process = SupervisedProcess(folder, command, environment.variables(protocol.threads))
    try:
        while (ended := process.ended()) is None:
            time.sleep(POLL_SECONDS)
    finally:
        process.stop()
    if ended.returncode:
        raise classify_failure(folder / "child.log", ended.returncode)
    found: dict[str, Any] = read_json(folder / "report.json")
    return found


def working_bytes(checkpoints: Sequence[Checkpoint], trainings_at_once: int) -> int:
    """Bound what trainings write while they run: two checkpoints of the largest model each."""
    weights = max(pruned_weights(c.dims) + 2 * c.dims.vocab_size * c.dims.hidden_size for c in checkpoints)
    return CHECKPOINT_BYTES * weights * trainings_at_once


def matrix_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    weights = TensorFiles(weight_files(folder))
    return {n: s for n, s in weights.shapes.items() if matrix_named(n)}
