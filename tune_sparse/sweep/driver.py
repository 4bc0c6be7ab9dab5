"""A sweep: what the ledger lacks of a plan, run through one Ray Tuner on warm workers, and tracked."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tune_sparse.cerebras.environment import check_cluster
from tune_sparse.cerebras.preflight import prepare_cerebras, working_bytes
from tune_sparse.config import CS3, CS3_TRIAL, SweepConfig
from tune_sparse.files import check_room
from tune_sparse.ledger.lease import Holder
from tune_sparse.ledger.ledger import Ledger, Run, SweepRecord
from tune_sparse.models.checkpoints import prepare_models
from tune_sparse.models.toy_models import TOY_MODELS
from tune_sparse.sweep.forecast import longest_first
from tune_sparse.sweep.nodes import check_head
from tune_sparse.sweep.plan import (
    Plan,
    check_disk,
    check_folder,
    check_names,
    check_rows,
    plan_sweep,
)
from tune_sparse.sweep.progress import Progress
from tune_sparse.sweep.resources import Placement, available_cores
from tune_sparse.tracking.background import BackgroundTracker, track_sweep
from tune_sparse.tracking.sync import tracking_uri

if TYPE_CHECKING:
    from ray.tune import Callback, Stopper

    from tune_sparse.sweep.callbacks import Stop
    from tune_sparse.sweep.scheduler import ResourceQueue

logger = logging.getLogger(__name__)

SCARCEST_FIRST = ("cerebras", "torch")
"""Backends in the order in which they are offered what is free."""


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


def run_sweep(config: SweepConfig, retry_failed: bool = False, only: Collection[str] | None = None) -> Outcome:
    """Plan a sweep, run what is missing through Ray Tune, and track it. Starting it again resumes it.

    only: ids of the runs to run now; by default all that are missing.
    Raises `InputError` before any trial starts if anything is wrong with the input.
    """
    ledger, uri = Ledger(config.results_dir), tracking_uri(config)
    check_names(config)
    check_rows(config)
    check_folder(ledger.folder)
    prepare_models([model for model in config.models if model in TOY_MODELS], report=logger.info)
    plan = plan_sweep(config)
    check_disk(plan, ledger, plan.missing(ledger, retry_failed))
    if "cerebras" in config.backends:
        check_cerebras(plan, ledger)
    started = time.perf_counter()
    with Holder(ledger.folder) as holder:
        ledger.remove_partial()
        record = _keep_start(ledger, plan.record)
        ledger.write_sweep(record)
        left = plan.missing(ledger, retry_failed)
        missing = [run for run in left if only is None or run.run_id in only]
        done_before = len(plan.runs) - len(left)
        progress = Progress(done_before + len(missing), done_before)
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
        check_cluster()
    needed = working_bytes(list(plan.checkpoints.values()), settings.cs3)
    check_room(ledger.folder, needed, "training on Cerebras", "Free some, or give another --results-dir.")


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
    config = plan.config
    with started_ray(config) as workers, gathered(ledger, holder.token, missing):
        from trainables.cell import CellTrainable
        from tune_sparse.sweep.callbacks import LedgerCallback, Stop
        from tune_sparse.sweep.scheduler import ResourceQueue

        placement, stop = Placement(config, nodes), Stop()
        for run in plan.runs.values():
            placement.learn(run, ledger.record(run.run_id))
        placement.check_placeable(missing)

        def make_trial(run: Run) -> dict[str, Any]:
            trial = {
                "run": run.as_config(),
                "results_dir": str(ledger.folder.resolve()),
                "token": holder.token,
                "hang_seconds": config.hang_seconds,
                "resources": placement.resources(run),
            }
            return trial | ({"cerebras": asdict(config.cerebras)} if run.cerebras else {})

        waiting = longest_first(plan, ledger, missing)
        queues = {name: [run for run in waiting if run.cell.backend == name] for name in SCARCEST_FIRST}
        queue = ResourceQueue(queues, make_trial, capacity, _limit(config), stop)
        callback = LedgerCallback(
            ledger,
            {run.run_id: run for run in missing},
            progress,
            tracker,
            holder,
            stop,
            placement,
            requeue=lambda run: queue.requeue(run.cell.backend, run),
            max_retries=config.max_retries,
        )
        # Ray takes the signals for itself when it starts, so ours come after it.
        with progress.shown(workers), stop_on_signals(stop):
            fit_trials(CellTrainable, queue, callback, stop)
        if not holder.lost.is_set():
            callback.record_unfinished()
        return stop.reason, workers


def _limit(config: SweepConfig) -> int | None:
    """Trials at once, where resources alone would allow more: Ray on this machine has room for `workers` only."""
    return config.workers if "RAY_ADDRESS" in os.environ and len(config.backends) == 1 else None


@contextmanager
def gathered(ledger: Ledger, token: str, missing: Sequence[Run]) -> Iterator[None]:
    """Runs of nodes that do not see the results folder arrive there. Raises `InputError` where they could not."""
    if "RAY_ADDRESS" not in os.environ:
        yield
        return
    from trainables.remote_ledger import check_visible, open_desk

    folder = ledger.folder.resolve()
    if any(run.cerebras for run in missing):
        check_visible(folder, token, "the backend cerebras needs", lambda held: bool({CS3, CS3_TRIAL} & held.keys()))
    with open_desk(folder, token):
        yield


def fit_trials(trainable: type, queue: ResourceQueue, callback: Callback, stopper: Stopper | None = None) -> None:
    """Run what `queue` hands out on warm workers, through one Tuner. Ray keeps nothing of it: the ledger does."""
    from ray import tune

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([config["trial"]["resources"]])

    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(sys.maxsize)  # the queue alone says how many there are
    with tempfile.TemporaryDirectory(prefix="tune-sparse-") as scratch:
        tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=queue,
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                callbacks=[callback],
                stop=stopper,
                # A worker on another host would look for this host's scratch folder, and fail.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


def nodes() -> list[dict[str, float]]:
    """The resources of each node of the Ray cluster that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def capacity() -> dict[str, float]:
    """The resources of the whole Ray cluster."""
    import ray

    return dict(ray.cluster_resources())


@contextmanager
def started_ray(config: SweepConfig) -> Iterator[int]:
    """Ray on this machine, or on the cluster that RAY_ADDRESS names; yields how many trials run at once."""
    # Our own progress, our own ledger.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # A trial that asks for no GPU must see none: it would compute there unasked.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "1"
    if "ray" not in sys.modules:  # set later, it would part this process from the cluster that it starts
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are ours to report

    threads = config.protocol.threads
    if "RAY_ADDRESS" not in os.environ:
        ray.init(
            address="local",
            num_cpus=(config.workers or max(1, available_cores() // threads)) * threads,
            resources={CS3: config.cerebras.cs3, CS3_TRIAL: config.cerebras.cs3 + 1},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    else:
        check_head(os.environ["RAY_ADDRESS"])
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        available = capacity()
        workers = int(available.get("CPU", 0) // threads)
        gpus = 1.0 if config.gpus_per_trial is None else config.gpus_per_trial
        if gpus:
            workers = min(workers, int(available.get("GPU", 0) / gpus))
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
