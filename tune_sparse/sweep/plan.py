"""A plan: the whole matrix checked before anything runs, each cell with the run that serves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces.matrix import cells as combinations
from tune_sparse.cerebras.conversion import check_convertible
from tune_sparse.cerebras.environment import cerebras_identity
from tune_sparse.config import SPLIT, Cell, SweepConfig
from tune_sparse.data.task_types import AnswerTask, TextTask
from tune_sparse.data.tasks import mean_chance, tasks_named
from tune_sparse.errors import InputError
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.identity import hash_json
from tune_sparse.ledger import prunings
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.record import Record, SweepRecord
from tune_sparse.ledger.run import Run, readable_id
from tune_sparse.ledger.rungs import RungJournal
from tune_sparse.models.architectures import adapter_weights, pruned_weights
from tune_sparse.models.checkpoints import Checkpoint, check_checkpoint, short_name
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.from_scratch import PREFIX, is_from_scratch, source_folder
from tune_sparse.models.other_weights import count_other_weights
from tune_sparse.models.toy_models import TOY_MODELS
from tune_sparse.modes import MODES
from tune_sparse.pruning.methods import check_schedule, method_named
from tune_sparse.pruning.prune_model import check_method_sparsities
from tune_sparse.pruning.reconstruction import check_recoverable, check_windows
from tune_sparse.sweep.cards import gpus_asked, memory_of_run
from tune_sparse.sweep.chains import (
    chain,
    chain_points,
    chains_of,
    check_chains,
    check_nested,
    last_of_chain,
    levels_of,
)
from tune_sparse.sweep.examples import Examples, read_examples
from tune_sparse.sweep.points import CellAtPoint, at_points, check_axes_are_read
from tune_sparse.sweep.retries import has_more_memory_now, is_missing, lacked_memory
from tune_sparse.sweep.siblings import check_siblings
from tune_sparse.training.budgets import cpu_budgets

if TYPE_CHECKING:
    from tune_sparse.sweep.early_stopping import EarlyStopper

OUTCOME_BYTES = 400
"""A scored example takes so much besides a generated text: an outcome before and after the last mask."""
TOKEN_BYTES = 8
"""A generated token takes so much, kept before and after the last mask."""
RUN_BYTES = 64 * 1024
"""The other files of a run take so much."""


@dataclass(frozen=True)
class Plan:
    """A sweep that was found sound: its cells and the distinct runs that serve them, in the order of running."""

    config: SweepConfig
    record: SweepRecord
    runs: dict[str, Run]
    checkpoints: dict[str, Checkpoint]
    """by the models' short names"""
    examples: Examples

    @property
    def dims(self) -> dict[str, ModelDims]:
        """By the models' short names."""
        return {name: checkpoint.dims for name, checkpoint in self.checkpoints.items()}

    def missing(self, ledger: LedgerReader, retry_failed: bool = False) -> list[Run]:
        """Runs that no finished record serves, and that this sweep does not stop early. A run that failed for good is
        missing only if `retry_failed`, or if it lacked memory that it may have now."""
        again = {run.run_id for run, _, why in self.lacked_memory(ledger) if why}
        records = [(run, ledger.record(run_id)) for run_id, run in self.runs.items()]
        missing = [run for run, record in records if run.run_id in again or is_missing(record, retry_failed)]
        stopper = self.stopper(ledger)
        return [run for run in missing if stopper is None or not stopper.is_stopped(run.run_id)]

    def stopper(self, ledger: LedgerReader) -> EarlyStopper | None:
        """What stops runs early, as far as the ledger says already; None where every run goes to its end."""
        if not self.config.early_stopping.stop_early:
            return None
        from tune_sparse.sweep.ray_session import set_environment

        set_environment()
        from tune_sparse.sweep.early_stopping import EarlyStopper

        return EarlyStopper(self.config.early_stopping, self.runs, RungJournal(ledger.folders[0]))

    def lacked_memory(self, ledger: LedgerReader) -> list[tuple[Run, Record, str | None]]:
        """Runs that failed for too little memory on a whole device: (run, record, why it may have enough now)."""
        records = [(run, ledger.record(run_id)) for run_id, run in self.runs.items()]
        lacking = [(run, record) for run, record in records if record and lacked_memory(record)]
        dims = self.dims
        return [(run, r, has_more_memory_now(r, run, self.config, dims[run.cell.model])) for run, r in lacking]

    def estimate_bytes(self, run: Run) -> int:
        """Estimate the bytes that a run will write: mostly what it trained and its outcomes."""
        dims = self.checkpoints[run.cell.model].dims
        trained = 4 * adapter_weights(dims, run.protocol.lora_rank)
        if not MODES[run.cell.mode].has_adapter:
            trained = pruned_weights(dims) * run.protocol.weight_bytes
            trained += pruned_weights(dims) // 8 if run.updates else 0  # the masks that it ends with
        trained += count_other_weights(dims, run.protocol.train_also) * run.protocol.weight_bytes
        generates = any(isinstance(task, AnswerTask) for task in tasks_named(run.cell.task))
        outcome = OUTCOME_BYTES + TOKEN_BYTES * (run.protocol.max_new_tokens if generates else 0)
        return trained + outcome * (run.protocol.n_test or 10_000) + RUN_BYTES


def pruning_bytes(plan: Plan, ledger: LedgerReader, runs: Iterable[Run]) -> int:
    """Compute the bytes of the prunings that some runs read and that are not stored yet, each made once.

    Raises `NotReadyError` for a stored one that is not whole.
    """
    by_id = {run.pruning_id: run for run in runs if run.pruning_id}
    missing = [run for run in by_id.values() if ledger.pruning(run) is None]
    return sum(
        prunings.pruning_bytes(plan.dims[r.cell.model], r.cell.sparsity, r.protocol.weight_bytes, r.updates_weights)
        for r in missing
    )


def checkpoint_bytes(plan: Plan, runs: Iterable[Run]) -> int:
    """What the largest unfinished training of some runs takes, its last checkpoint beside the new one for a moment."""
    own = (run for run in runs if run.cerebras is None)
    return max((cell.checkpoint_bytes for cell in memory_of(plan, own)), default=0)


def host_bytes(plan: Plan, runs: Iterable[Run]) -> int:
    """The most memory that a trial of some runs takes of its host, with its child: without GPUs, everything."""
    runs, on_gpu = list(runs), bool(gpus_asked(plan.config))
    scores_on_gpu, target = plan.config.cerebras.scoring_gpus > 0, plan.config.cerebras.cerebras_target
    own = memory_of(plan, (run for run in runs if run.cerebras is None))
    there = memory_of(plan, (run for run in runs if run.cerebras is not None))
    needed = [cell.host_bytes(cpu_budgets(cell.longest), on_gpu) for cell in own]
    needed += [cell.cerebras_host_bytes(cpu_budgets(cell.longest), scores_on_gpu, target) for cell in there]
    return max(needed, default=0)


def memory_of(plan: Plan, runs: Iterable[Run]) -> list[CellMemory]:
    """The memory of each kind of run."""
    return list(dict.fromkeys(memory_of_run(run, plan.dims) for run in runs))


def requested_cells(config: SweepConfig) -> list[Cell]:
    """Every cell of the matrix, ordered so that a worker rarely changes model or task, and so that two workers
    rarely need the same accuracy before tuning at once."""
    split = split_blocks(config) if config.backend == (SPLIT,) else {}
    axes = {
        "model": config.models,
        "task": config.tasks,
        "mode": config.modes,
        "schedule": config.schedules,
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


def requested_points(config: SweepConfig) -> list[CellAtPoint]:
    """Every cell of the matrix at each point of the axes."""
    return [point for cell in requested_cells(config) for point in at_points(config, cell)]


def trained_points(config: SweepConfig) -> list[CellAtPoint]:
    """The trainings that serve all cells at all points, levels on the way to a cell among them."""
    trained = dict.fromkeys(point.trained for point in requested_points(config))
    return list(dict.fromkeys(training for point in trained for training in chain_points(point)))


def distinct_trainings(config: SweepConfig) -> int:
    """How many trainings serve all cells."""
    return len(trained_points(config))


def make_plan(config: SweepConfig) -> Plan:
    """Check the whole matrix and every input, and name every run. Nothing is written, trained or fetched but examples.

    Raises `InputError` for anything that would stop a trial later: unknown names, bad weights, bad examples, a sparsity
    that structured pruning cannot reach. To run what is planned, `prepare` it.
    """
    check_names(config)
    return plan_cells(config, read_examples(config))


def plan_cells(config: SweepConfig, examples: Examples) -> Plan:
    """Check every model, and name the run of every cell."""
    checkpoints = {short_name(model): check_checkpoint(model) for model in config.models}
    for checkpoint in checkpoints.values():
        _check_model(config, checkpoint)
    name_run = _run_namer(config, checkpoints, examples)
    runs: dict[str, Run] = {}
    owners: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for point in requested_points(config):
        requested, run = name_run(point), name_run(point.trained)
        *on_the_way, _ = chain(run)
        for own, served_by in (*zip(on_the_way, on_the_way, strict=True), (requested, run)):
            cell_id = readable_id(own.cell, own.identity)
            runs.setdefault(served_by.run_id, served_by)
            if own is not requested and cell_id in rows:
                continue
            owner = owners.setdefault(served_by.run_id, cell_id)
            rows[cell_id] = (
                {"cell_id": cell_id, "run_id": served_by.run_id, "shared_with": None if owner == cell_id else owner}
                | {"pruning_id": served_by.pruning_id}
                | asdict(own.cell)
                | ({} if own is requested else {"chain_to": point.cell.sparsity})
                | {"axes": dict(point.point), "chance": mean_chance(tasks_named(point.cell.task))}
            )
    if config.early_stopping.stop_early:
        check_siblings(config.early_stopping, runs.values())
    described = {name: _plain(value) for name, value in asdict(config).items()}
    sweep_id = hash_json(sorted(rows))[:12]
    record = SweepRecord(sweep_id, time.time(), described, tuple(rows.values()))
    return Plan(config, record, runs, checkpoints, examples)


def _run_namer(
    config: SweepConfig, checkpoints: Mapping[str, Checkpoint], examples: Examples
) -> Callable[[CellAtPoint], Run]:
    """A function that gives a cell at a point its run."""
    cerebras = cerebras_identity(config.cerebras) if "cerebras" in config.backends else None
    model_paths = {short_name(model): _model_path(model) for model in config.models}
    text = examples.calibration_fingerprint

    def name_run(point: CellAtPoint) -> Run:
        cell, protocol = point.cell, point.protocol
        checkpoint = checkpoints[short_name(cell.model)]
        run = Run(
            cell=replace(cell, model=checkpoint.name),
            protocol=protocol,
            model_path=model_paths[checkpoint.name],
            data_dir=str(examples.data_dir) if examples.data_dir else None,
            model_fingerprint=checkpoint.fingerprint,
            data_fingerprint=examples.fingerprints[cell.task],
            prompt_version="+".join(str(task.prompt_version) for task in tasks_named(cell.task)),
            calibration_fingerprint=None if protocol.calibration == "task" else text,
            cerebras=cerebras if cell.backend == "cerebras" else None,
            budgets=config.budgets,
            schedule_settings=point.schedule_settings,
        )
        return last_of_chain(run, levels_of(point))

    return name_run


def _check_model(config: SweepConfig, checkpoint: Checkpoint) -> None:
    """Raise `InputError` for a model that no trial could prune, prompt or convert as the matrix asks."""
    for protocol in config.protocols:
        protocol.within(checkpoint.dims.max_positions)
        if protocol.recover != "none":
            window = min(protocol.calibration_window, checkpoint.dims.max_positions)
            check_windows(-(-(protocol.calibration_tokens - 1) // window))  # a last token alone is no window
    _check_reachable(config, checkpoint)
    if "cerebras" in config.backends:
        check_convertible(checkpoint.path)


def _check_reachable(config: SweepConfig, checkpoint: Checkpoint) -> None:
    """Raise `InputError` for a method that cannot prune this model to a sparsity of the matrix."""
    for method in config.methods:
        try:
            check_method_sparsities(method, checkpoint.dims, config.sparsities)
            for levels in chains_of(config):
                check_method_sparsities(method, checkpoint.dims, [level.sparsity for level in levels])
                check_nested(method, checkpoint.dims, levels)
        except InputError as error:
            raise InputError(f"{checkpoint.name}: {error}") from error


def _model_path(reference: str) -> str:
    """Return a reference that finds the same model from another working directory."""
    if (source := source_folder(reference)) is not None:
        return f"{PREFIX}{source.resolve()}"
    folder = Path(reference).expanduser()
    is_named = reference in TOY_MODELS or is_from_scratch(reference)
    return reference if is_named or not folder.exists() else str(folder.resolve())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def check_names(config: SweepConfig) -> None:
    """Raise `InputError` for a task or method that no table has, models that tables could not tell apart, or an axis
    that changes nothing."""
    _check_distinct_names(config.models)
    check_chains(config)
    for task in config.tasks:
        tasks_named(task)
    check_find(config)
    for method, protocol in product(config.methods, config.protocols):
        check_recoverable(method, protocol.recover)
        if method_named(method).needs.gradients and protocol.calibration_order == "sequential":
            raise InputError(
                f"{method} needs gradients of the whole dense model, got calibration_order sequential. "
                "Set calibration_order=dense, or leave the method out."
            )
    for method, schedule in product(config.methods, config.schedules):
        check_schedule(method, schedule, config.backends)
    check_axes_are_read(config, requested_cells(config))


def check_find(config: SweepConfig) -> None:
    """Raise `InputError` for a task whose metric `--find` has no rule for."""
    rule_of = config.find_rule
    for name in config.tasks if rule_of else ():
        is_text = any(isinstance(task, TextTask) for task in tasks_named(name))
        if rule_of and (rule_of.perplexity if is_text else rule_of.within) is None:
            metric, fix = ("a perplexity", "perplexity=1.10") if is_text else ("an accuracy", "within=0.10")
            raise InputError(
                f"find needs a rule for every task, got {' '.join(config.find)}, which says nothing of {name}: it is "
                f"judged by {metric}. Add {fix}, say, or sweep it apart."
            )


def _check_distinct_names(references: Sequence[str]) -> None:
    named: dict[str, str] = {}
    for reference in references:
        other = named.setdefault(short_name(reference), reference)
        if other != reference:
            raise InputError(
                f"models of one sweep must differ in the last part of their names, got {other} and {reference}. "
                "Rename a folder."
            )
