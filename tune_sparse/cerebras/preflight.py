"""Prepare a sweep on Cerebras, once: end left-overs, convert models, lower each kind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tune_sparse.cerebras import appliance
from tune_sparse.cerebras.conversion import to_cerebras
from tune_sparse.cerebras.environment import check_cluster, find_environment
from tune_sparse.cerebras.failures import classify_failure
from tune_sparse.cerebras.graphs import Graph
from tune_sparse.cerebras.guard import (
    STOP_SECONDS,
    WORKING_FILES,
    SupervisedProcess,
    is_guarded,
    keep_checkpoint,
    remove_files,
)
from tune_sparse.cerebras.job import CHILD, job_appliance, job_protocol, named_adapters
from tune_sparse.cerebras.stages import COMPILING, QUEUE, read_stages
from tune_sparse.config import Cerebras, SweepConfig
from tune_sparse.files import read_json, write_json
from tune_sparse.identity import hash_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.architectures import matrix_named, pruned_weights
from tune_sparse.models.checkpoints import Checkpoint
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.model_zoo import cerebras_name
from tune_sparse.models.safetensors_io import TensorFiles, weight_files
from tune_sparse.modes import MODES
from tune_sparse.pruning.methods import method_named
from tune_sparse.schedules import SCHEDULES

POLL_SECONDS = 0.2
FLOAT_BYTES, SAVED_BYTES, MASK_BYTES = 4, 12, 1
"""A weight's bytes on disk while a training runs: in float32; in a checkpoint, with AdamW's moments; its mask."""


@dataclass(frozen=True)
class Lowering:
    """The result of lowering one graph with the compiler's front end."""

    graph: Graph
    precision: str
    seconds: float
    peak_memory_bytes: int
    sparsity_annotations: int
    annotated_matrices: int

    def summary(self) -> str:
        return (
            f"{self.graph.summary()}, {self.precision}: lowered in {self.seconds:.0f} s with "
            f"{self.peak_memory_bytes / 1e9:.1f} GB, {self.sparsity_annotations} sparsity annotations for "
            f"{self.annotated_matrices} matrices"
        )


@dataclass(frozen=True)
class Compiling:
    """The result of compiling one graph on the appliance."""

    graph: Graph
    seconds: float
    queue_seconds: float
    is_cached: bool
    """the appliance had it already"""
    estimated_examples_per_second: float | None
    """the compiler's own estimate of the training: no measurement"""

    def summary(self) -> str:
        how = "found in the appliance's cache" if self.is_cached else f"compiled in {self.seconds / 60:.1f} min"
        return f"{self.graph.summary()}: {how}, after {self.queue_seconds / 60:.1f} min in the queue"


def prepare_cerebras(
    config: SweepConfig,
    checkpoints: Mapping[str, Checkpoint],
    graphs: Sequence[Graph],
    ledger: Ledger,
    report: Callable[[str], None],
) -> None:
    """Make a results folder, that the caller has locked, and its models ready to train on Cerebras.

    Before a csx sweep its graphs are lowered, and where that was asked for compiled. Raises `InputError` or `RunError`
    for what would stop every trial. A compile that the appliance lost is left to the trainings.
    """
    environment = find_environment()
    for problem in end_leftovers(ledger, config.cerebras):
        report(problem)
    for checkpoint in checkpoints.values():
        to_cerebras(checkpoint.path, checkpoint.fingerprint, environment)
    if config.cerebras.cerebras_target == "csx":
        check_cluster(config.cerebras)
        for lowering in lower_all(config, checkpoints, graphs, ledger):
            report(lowering.summary())
        for graph in graphs if config.cerebras.compile_first else ():
            try:
                report(compile_graph(config, checkpoints[graph.model], graph, ledger).summary())
            except ConnectionError as error:
                report(f"{graph.summary()}: not compiled ahead: {error}")


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


def lower_all(
    config: SweepConfig, checkpoints: Mapping[str, Checkpoint], graphs: Sequence[Graph], ledger: Ledger
) -> Iterator[Lowering]:
    """Lower graphs that will be trained, of those that differ in numbers alone the last.

    Raises `RunError` that names what has no lowering.
    """
    kinds = {graph.operations: graph for graph in graphs}
    for graph in kinds.values():
        folder = write_graph(config, checkpoints[graph.model], graph, ledger, Cerebras(cerebras_target="validate"))
        report = run_child(folder, config.protocol.threads)
        yield Lowering(
            graph,
            config.protocol.precision,
            report["seconds"],
            report["peak_memory_bytes"],
            report["sparsity_annotations"],
            len(read_json(folder / "job.json")["annotated"]),
        )


def compile_all(
    config: SweepConfig, checkpoints: Mapping[str, Checkpoint], graphs: Sequence[Graph], ledger: Ledger
) -> Iterator[Compiling]:
    """Compile each graph as `compile_graph` does. Raises `InputError` where no appliance is known."""
    check_cluster(config.cerebras)
    for graph in graphs:
        yield compile_graph(config, checkpoints[graph.model], graph, ledger)


def compile_graph(config: SweepConfig, checkpoint: Checkpoint, graph: Graph, ledger: Ledger) -> Compiling:
    """Compile a graph on the appliance, into its cache; no CS-3 is held. Raises as a training does."""
    label = appliance.results_label(hash_json(str(ledger.folder.resolve())))
    folder = write_graph(config, checkpoint, graph, ledger, replace(config.cerebras, cerebras_target="csx"), label)
    run_child(folder, config.protocol.threads, label)
    stages = read_stages((folder / "child.log").read_text(errors="replace"))
    return Compiling(
        graph,
        stages.seconds[COMPILING],
        stages.seconds[QUEUE],
        stages.cached_compiles > 0,
        stages.estimated_examples_per_second,
    )


def write_graph(
    config: SweepConfig,
    checkpoint: Checkpoint,
    graph: Graph,
    ledger: Ledger,
    settings: Cerebras,
    label: str | None = None,
) -> Path:
    """Write a training of `graph` that takes no step, on the dense weights, into a folder of its own."""
    folder = ledger.folder / "cerebras" / f"graph_{checkpoint.name}_{hash_json(asdict(graph))[:12]}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "examples").mkdir(parents=True)
    protocol = config.protocol.within(checkpoint.dims.max_positions)
    examples = torch.zeros(1, 3, graph.tokens, dtype=torch.int32)
    order = torch.zeros(protocol.global_batch_size, dtype=torch.long)
    save_file({"examples": examples, "order": order}, folder / "examples" / "tokens.safetensors")
    shapes = matrix_shapes(checkpoint.path)
    if graph.trained.endswith("adapters"):
        adapters = {name: _no_adapter(shape, protocol.lora_rank) for name, shape in shapes.items()}
        save_file(named_adapters(adapters, checkpoint.dims.head_dim), folder / "adapter_start.safetensors")
    job = _graph_job(graph, {cerebras_name(name): list(shape) for name, shape in shapes.items()}, folder)
    if graph.changing:
        job["changes"] = graph.changing.job(graph.changing.counts_at_target(job["shapes"]))
    started = {"checkpoint_steps": None, "restart": None}
    of_appliance = job_appliance(settings, [label] if label else [], compile_only=label is not None)
    write_json(folder / "job.json", job | started | job_protocol(protocol, 0) | of_appliance)
    converted = to_cerebras(checkpoint.path, checkpoint.fingerprint, find_environment())
    write_json(folder / "base.json", {"config": str(converted.config), "checkpoint": str(converted.checkpoint)})
    return folder


def _graph_job(graph: Graph, shapes: dict[str, list[int]], folder: Path) -> dict[str, Any]:
    """A job of `graph`; exact annotations, known only when a model is pruned, stand at a half here."""
    adapter = folder / "adapter_start.safetensors"
    told = 0.5 if isinstance(graph.annotation, str) else graph.annotation
    return {
        "trains": "adapters" if adapter.exists() else "weights",
        "update_is_masked": graph.trained == "masked adapters",
        "pruned": list(shapes) if graph.trained == "masked weights" else [],
        "annotated": {} if told is None else dict.fromkeys(shapes, told),
        "changes": None,
        "shapes": shapes,
        "examples": str((folder / "examples").resolve()),
        "masks": None,
        "weights": None,
        "adapter": str(adapter.resolve()) if adapter.exists() else None,
    }


def _no_adapter(shape: Sequence[int], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)


def run_child(folder: Path, threads: int, label: str | None = None) -> dict[str, Any]:
    """Run what is written in `folder` to its end; returns the child's report. Raises `RunError` as a training does."""
    environment = find_environment()
    command = [str(environment.python), str(CHILD), str(folder.resolve())]
    process = SupervisedProcess(folder, command, environment.variables(threads), label)
    try:
        while (ended := process.ended()) is None:
            time.sleep(POLL_SECONDS)
    finally:
        process.stop()
    if ended.returncode:
        raise classify_failure(folder / "child.log", ended.returncode)
    found: dict[str, Any] = read_json(folder / "report.json")
    return found


def working_bytes(config: SweepConfig, models: Iterable[ModelDims]) -> int:
    """Bound what the trainings at one time write while they run, those of the largest model. Adapters are small.

    Each has what it begins with, the weights that its method, recovery or level before updated, and what it trained,
    with masks that changed, once more when that is read back. With checkpoints the last stands beside the new one, and
    one that was lost has where it goes on beside them.
    """
    trains_weights = not all(MODES[mode].has_adapter for mode in config.modes)
    schedules = [SCHEDULES[name] for name in config.schedules]
    masks = MASK_BYTES if any(schedule.planner for schedule in schedules) else 0
    saved = SAVED_BYTES + masks if trains_weights else 0
    is_recovered = any(protocol.recover != "none" for protocol in config.protocols)
    updates = is_recovered or any(method_named(name).updates_weights for name in config.methods)
    updated = FLOAT_BYTES if updates or any(schedule.in_levels for schedule in schedules) else 0
    working = FLOAT_BYTES + updated + saved + (FLOAT_BYTES + masks if trains_weights else 0)
    if config.cerebras.checkpoint_steps is not None:
        kept, resumed = saved, FLOAT_BYTES + saved
        working += saved + kept + resumed
    weights = max(pruned_weights(dims) + 2 * dims.vocab_size * dims.hidden_size for dims in models)
    return working * weights * config.cerebras.cs3


def matrix_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    weights = TensorFiles(weight_files(folder))
    return {n: s for n, s in weights.shapes.items() if matrix_named(n)}
