"""A sweep: the matrix planned and checked as a whole, then what the ledger lacks run through one Ray Tuner."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces.matrix import cells as combinations
from tune_sparse.config import EMBEDDED_ROWS, Cell, SweepConfig
from tune_sparse.data import load_splits
from tune_sparse.embedded_models import EMBEDDED_MODELS
from tune_sparse.errors import InputError, NotReadyError, unknown_name
from tune_sparse.holder import Holder, refuse_if_held
from tune_sparse.masks import structured_counts
from tune_sparse.methods import METHODS
from tune_sparse.models import Checkpoint, check_checkpoint, prepare_models, short_name
from tune_sparse.progress import Progress
from tune_sparse.result import Ledger, Record, Run, SweepRecord, readable_id, sha256_of
from tune_sparse.tasks import task_named
from tune_sparse.tracking import BackgroundTracker, tracking_uri

if TYPE_CHECKING:
    from ray.tune import Callback, Stopper

    from tune_sparse.ray_callback import Stop

logger = logging.getLogger(__name__)

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
        return [run for run in self.runs.values() if _is_missing(ledger.record(run.run_id), retry_failed)]

    def bytes_of(self, run: Run) -> int:
        """What a run will write, roughly: mostly its adapter and its outcomes."""
        shape = self.checkpoints[run.cell.model].shape
        adapter = 4 * shape.adapter_weights(run.protocol.lora_rank)
        generates = task_named(run.cell.task).kind == "generate"
        outcome = OUTCOME_BYTES + TOKEN_BYTES * (run.protocol.max_new_tokens if generates else 0)
        return adapter + outcome * (run.protocol.n_test or 10_000) + RUN_BYTES


def _is_missing(record: Record | None, retry_failed: bool) -> bool:
    if record is None or record.status == "interrupted":
        return True
    if record.status == "failed":
        return retry_failed or bool(record.error and record.error["retryable"])
    return False


def asked_cells(config: SweepConfig) -> list[Cell]:
    """Every cell of the matrix, ordered so that a worker rarely changes model or task, and so that two workers
    rarely need the same accuracy before tuning at once."""
    axes = {
        "model": config.models,
        "task": config.tasks,
        "mode": config.modes,
        "method": config.methods,
        "sparsity": config.sparsities,
        "seed": config.seeds,
    }
    return [Cell(**point, backend=config.backend) for point in combinations(axes)]


def distinct_trainings(config: SweepConfig) -> int:
    """How many trainings serve all cells."""
    return len({cell.trained for cell in asked_cells(config)})


def plan_sweep(config: SweepConfig) -> Plan:
    """Check the whole matrix and every input, and name every run.

    Raises `InputError` for anything that would stop a trial later: unknown names, bad weights, bad rows,
    a sparsity that structured pruning cannot reach.
    """
    check_names(config)
    tasks = {name: task_named(name) for name in config.tasks}
    data_dir, data = _rows_folder(config), check_rows(config)
    checkpoints = {short_name(model): check_checkpoint(model) for model in config.models}
    model_paths = {short_name(model): _model_path(model) for model in config.models}
    if "structured" in config.methods:
        for checkpoint in checkpoints.values():
            for sparsity in config.sparsities:
                try:
                    structured_counts(checkpoint.shape, sparsity)
                except InputError as error:
                    raise InputError(f"{checkpoint.name}: {error}") from error

    def run_of(cell: Cell) -> Run:
        checkpoint = checkpoints[short_name(cell.model)]
        return Run(
            cell=replace(cell, model=checkpoint.name),
            protocol=config.protocol,
            model_path=model_paths[checkpoint.name],
            data_dir=str(data_dir) if data_dir else None,
            model_fingerprint=checkpoint.fingerprint,
            data_fingerprint=data[cell.task],
            prompt_version=tasks[cell.task].prompt_version,
        )

    runs: dict[str, Run] = {}
    owners: dict[str, str] = {}
    rows = []
    for cell in asked_cells(config):
        asked, run = run_of(cell), run_of(cell.trained)
        cell_id = readable_id(asked.cell, asked.identity)
        runs.setdefault(run.run_id, run)
        owner = owners.setdefault(run.run_id, cell_id)
        rows.append(
            {"cell_id": cell_id, "run_id": run.run_id, "shared_with": None if owner == cell_id else owner}
            | asdict(asked.cell)
            | {"chance": tasks[cell.task].chance}
        )
    described = {name: _plain(value) for name, value in asdict(config).items()}
    sweep_id = sha256_of(sorted(row["cell_id"] for row in rows))[:12]
    return Plan(config, SweepRecord(sweep_id, time.time(), described, tuple(rows)), runs, checkpoints)


def _rows_folder(config: SweepConfig) -> Path | None:
    """Where rows come from; None for the embedded generator, which must be asked for by name."""
    if config.data_dir is None:
        raise NotReadyError(
            "a sweep needs the rows of its tasks, got no data_dir. "
            f"Give --data-dir FOLDER, or --data-dir {EMBEDDED_ROWS} for generated rows."
        )
    return None if config.data_dir == EMBEDDED_ROWS else config.data_dir.expanduser().resolve()


def _model_path(reference: str) -> str:
    """What finds the same model from another working directory."""
    folder = Path(reference).expanduser()
    return reference if reference in EMBEDDED_MODELS or not folder.is_dir() else str(folder.resolve())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def check_rows(config: SweepConfig) -> dict[str, str]:
    """{task: fingerprint of its splits}; every row is read and checked."""
    folder = _rows_folder(config)
    return {name: load_splits(task_named(name), folder, config.protocol).fingerprint for name in config.tasks}


def check_names(config: SweepConfig) -> None:
    """Raise `InputError` for a task or method that no table has, or models that tables could not tell apart."""
    _refuse_ambiguous_names(config.models)
    for task in config.tasks:
        task_named(task)
    for method in config.methods:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)


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
    needed, free = sum(plan.bytes_of(run) for run in missing), shutil.disk_usage(ledger.folder).free
    if needed > free:
        raise InputError(
            f"a sweep needs room for what it writes, about {needed / 1e9:.2f} GB, {ledger.folder} has "
            f"{free / 1e9:.2f} GB. Free some, or give another --results-dir."
        )


@dataclass(frozen=True)
class Forecast:
    """What the missing runs will take, from measured runs of the same model and task."""

    seconds: float | None
    """Device-seconds, or None while some model and task have no measured run."""
    disk_bytes: int
    unmeasured: int
    """Runs without a measured one to go by."""


def forecast(plan: Plan, ledger: Ledger, missing: Sequence[Run]) -> Forecast:
    """Device-seconds as the median of done runs of the same model, task and protocol in this folder."""
    measured: dict[tuple[str, str], list[float]] = {}
    for run in plan.runs.values():
        record = ledger.record(run.run_id)
        if record and record.status == "done":
            measured.setdefault((run.cell.model, run.cell.task), []).append(record.measured["trial_seconds"])
    known = [
        statistics.median(measured[key]) for run in missing if (key := (run.cell.model, run.cell.task)) in measured
    ]
    unmeasured = len(missing) - len(known)
    return Forecast(None if unmeasured else sum(known), sum(plan.bytes_of(run) for run in missing), unmeasured)


@dataclass(frozen=True)
class Outcome:
    """How a sweep went."""

    plan: Plan
    ran: int
    done: int
    failed: int
    left: int
    stopped: str | None
    """Why the sweep ended early, if it did."""
    seconds: float
    utilisation: float | None
    """Sum of trial seconds over (workers x wall seconds), or None if nothing ran."""


def run_sweep(config: SweepConfig, retry_failed: bool = False) -> Outcome:
    """Plan a sweep, run what is missing through Ray Tune, and track it. Starting it again resumes it.

    Raises `InputError` before any trial starts if anything is wrong with the input.
    """
    ledger = Ledger(config.results_dir)
    check_names(config)
    check_rows(config)
    check_folder(ledger.folder)
    prepare_models([model for model in config.models if model in EMBEDDED_MODELS], report=logger.info)
    plan = plan_sweep(config)
    check_disk(plan, ledger, plan.missing(ledger, retry_failed))
    started = time.perf_counter()
    with Holder(ledger.folder) as holder:
        ledger.remove_partial()
        ledger.write_sweep(_keep_start(ledger, plan.record))
        missing = plan.missing(ledger, retry_failed)
        progress = Progress(len(plan.runs), len(plan.runs) - len(missing))
        with BackgroundTracker(ledger, tracking_uri(config), plan.record.sweep_id) as tracker:
            stopped, workers = None, 1
            if missing:
                stopped, workers = _tune(plan, ledger, missing, progress, tracker, holder)
                if not holder.lost.is_set():
                    ledger.remove_partial()
        seconds = time.perf_counter() - started
    records = {run_id: ledger.record(run_id) for run_id in plan.runs}
    ran = [r for run in missing if (r := records[run.run_id]) and r.status == "done"]
    statuses = [record.status if record else None for record in records.values()]
    trial_seconds = sum(record.measured["trial_seconds"] for record in ran)
    return Outcome(
        plan=plan,
        ran=len(ran),
        done=statuses.count("done"),
        failed=statuses.count("failed"),
        left=len(statuses) - statuses.count("done") - statuses.count("failed"),
        stopped=stopped,
        seconds=seconds,
        utilisation=trial_seconds / (workers * seconds) if ran else None,
    )


def _keep_start(ledger: Ledger, record: SweepRecord) -> SweepRecord:
    """The same sweep started again keeps the time of its first start."""
    earlier = [sweep.started for sweep in ledger.sweeps() if sweep.sweep_id == record.sweep_id]
    return replace(record, started=min(earlier, default=record.started))


def _tune(
    plan: Plan,
    ledger: Ledger,
    missing: Sequence[Run],
    progress: Progress,
    tracker: BackgroundTracker,
    holder: Holder,
) -> tuple[str | None, int]:
    """Run `missing` through one Tuner; returns (why it ended early, if it did; workers)."""
    with started_ray(plan.config, len(missing)) as workers:
        from trainables.cell import CellTrainable
        from tune_sparse.ray_callback import LedgerCallback, Stop

        stop = Stop()
        callback = LedgerCallback(ledger, {run.run_id: run for run in missing}, progress, tracker, holder, stop)
        # Ray takes the signals for itself when it starts, so ours come after it.
        with progress.shown(workers), stop_on_signals(stop):
            for _ in range(1 + plan.config.max_retries):
                trials = [{"run": run.as_config(), "results_dir": str(ledger.folder.resolve())} for run in missing]
                fit_trials(CellTrainable, trials, plan.config, workers, callback, stop)
                missing = [run for run in missing if _is_missing(ledger.record(run.run_id), retry_failed=False)]
                if not missing or stop.reason:
                    break
                progress.again(len(missing))
        if not holder.lost.is_set():
            callback.record_unfinished()
        return stop.reason, workers


def fit_trials(
    trainable: type,
    trials: Sequence[dict[str, Any]],
    config: SweepConfig,
    workers: int,
    callback: Callback,
    stopper: Stopper | None = None,
) -> None:
    """Run each of `trials` once on a warm worker, through one Tuner. Ray keeps nothing of it: the ledger does."""
    from ray import tune

    resources = {"cpu": config.protocol.threads, "gpu": config.gpus_per_trial}
    with tempfile.TemporaryDirectory(prefix="tune-sparse-") as scratch:
        tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space={"trial": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=workers,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                callbacks=[callback],
                stop=stopper,
            ),
        ).fit()


@contextmanager
def started_ray(config: SweepConfig, trials: int) -> Iterator[int]:
    """Ray on this machine, or on the cluster that RAY_ADDRESS names; yields how many trials run at once."""
    # Our own progress, our own ledger, no trial held back behind others.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(trials + 1)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # A trial that asks for no GPU must see none: it would compute there unasked.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "1"
    if "ray" not in sys.modules:  # set later, it would part this process from the cluster that it starts
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are ours to report

    threads = config.protocol.threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "RAY_ADDRESS" not in os.environ:
        ray.init(
            address="local",
            num_cpus=(config.workers or max(1, cores // threads)) * threads,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    else:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        available = ray.cluster_resources()
        workers = int(available.get("CPU", 0) // threads)
        if config.gpus_per_trial:
            workers = min(workers, int(available.get("GPU", 0) / config.gpus_per_trial))
        if workers < 1:
            raise InputError(
                f"a trial needs {threads} CPU and {config.gpus_per_trial:g} GPU, Ray has {available.get('CPU', 0):g} "
                f"CPU and {available.get('GPU', 0):g} GPU. Lower threads or gpus_per_trial, or add nodes."
            )
        yield min(workers, config.workers or workers)
    finally:
        ray.shutdown()


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM give `stop` its reason, so that running trials end and nothing half-written stays.

    A second SIGINT interrupts at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        stop.because(f"interrupted by {signal.Signals(number).name}")
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
