"""A sweep: what the ledger lacks of a plan, run through one Ray Tuner on warm workers, and tracked."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tune_sparse.cerebras.environment import refuse_unreachable_cluster
from tune_sparse.cerebras.preflight import prepare_cerebras, refuse_full, working_bytes
from tune_sparse.config import CS3, CS3_TRIAL, SweepConfig
from tune_sparse.embedded_models import EMBEDDED_MODELS
from tune_sparse.errors import InputError
from tune_sparse.holder import Holder
from tune_sparse.models import prepare_models
from tune_sparse.plan import Plan, check_disk, check_folder, check_names, check_rows, is_missing, plan_sweep
from tune_sparse.progress import Progress
from tune_sparse.result import Ledger, Run, SweepRecord
from tune_sparse.tracking import tracking_uri
from tune_sparse.tracking_thread import BackgroundTracker, track_sweep

if TYPE_CHECKING:
    from ray.tune import Callback, Stopper

    from tune_sparse.ray_callback import Stop

logger = logging.getLogger(__name__)


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
    ledger, uri = Ledger(config.results_dir), tracking_uri(config)
    check_names(config)
    check_rows(config)
    check_folder(ledger.folder)
    prepare_models([model for model in config.models if model in EMBEDDED_MODELS], report=logger.info)
    plan = plan_sweep(config)
    check_disk(plan, ledger, plan.missing(ledger, retry_failed))
    if "cerebras" in config.backend:
        check_cerebras(plan, ledger)
    started = time.perf_counter()
    with Holder(ledger.folder) as holder:
        ledger.remove_partial()
        record = _keep_start(ledger, plan.record)
        ledger.write_sweep(record)
        missing = plan.missing(ledger, retry_failed)
        progress = Progress(len(plan.runs), len(plan.runs) - len(missing))
        with track_sweep(ledger, uri, record) as tracker:
            stopped, workers = None, 1
            if missing:
                if any(run.cerebras for run in missing):
                    prepare_cerebras(config, list(plan.checkpoints.values()), ledger, report=logger.info)
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


def check_cerebras(plan: Plan, ledger: Ledger) -> None:
    """Raise `InputError` where nothing can be trained on Cerebras: no cluster, or no room for what trainings write."""
    settings = plan.config.cerebras
    if settings.cerebras_target == "csx":
        refuse_unreachable_cluster()
    refuse_full(ledger.folder, working_bytes(list(plan.checkpoints.values()), settings.cs3))


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
                trials = [_trial(run, ledger, plan.config) for run in missing]
                fit_trials(CellTrainable, trials, plan.config, workers, callback, stop)
                missing = [run for run in missing if is_missing(ledger.record(run.run_id))]
                if not missing or stop.reason:
                    break
                progress.again(len(missing))
        if not holder.lost.is_set():
            callback.record_unfinished()
        return stop.reason, workers


def _trial(run: Run, ledger: Ledger, config: SweepConfig) -> dict[str, Any]:
    """What a trial is given; `resources` are those it holds besides CPU and GPU."""
    common = {"run": run.as_config(), "results_dir": str(ledger.folder.resolve())}
    if run.cerebras is None:
        return common
    return common | {"cerebras": asdict(config.cerebras), "resources": {CS3_TRIAL: 1}}


def fit_trials(
    trainable: type,
    trials: Sequence[dict[str, Any]],
    config: SweepConfig,
    workers: int,
    callback: Callback,
    stopper: Stopper | None = None,
) -> None:
    """Run each of `trials` once on a warm worker, through one Tuner. Ray keeps nothing of it: the ledger does.

    Where trials differ in their resources, these alone bound how many run: each kind fills its own.
    """
    from ray import tune

    own = {"CPU": config.protocol.threads, "GPU": config.gpus_per_trial}
    kinds = {tuple(sorted(trial.get("resources", {}).items())) for trial in trials}

    def resources(chosen: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([own | chosen["trial"].get("resources", {})])

    with tempfile.TemporaryDirectory(prefix="tune-sparse-") as scratch:
        tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space={"trial": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=workers if len(kinds) == 1 else None,
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
            resources={CS3: config.cerebras.cs3, CS3_TRIAL: config.cerebras.cs3 + 1},
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
        for name in (CS3, CS3_TRIAL) if "cerebras" in config.backend else ():
            if available.get(name, 0) < 1:
                raise InputError(
                    f"the backend cerebras needs the Ray resource {name}, the cluster has none. Start a node with "
                    f"`ray start --resources='{{\"{name}\": 1}}'`; docs/cerebras.md says which."
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
