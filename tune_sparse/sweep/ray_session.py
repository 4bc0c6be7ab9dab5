"""The way into Ray Tune, for sweeps and searches alike: a session, trials run to their end, signals.

Why Tune: it places trials on nodes by the resources that they hold, keeps the workers of a kind warm from trial to
trial, tells of a worker or node that is lost, and lets a search talk with its trials while they run. It is a work queue
here and no more. What is done, what is tried again, and in which order trials start is ours (the ledger, the callbacks,
`ResourceQueue`, `JournaledSearcher`), because an experiment of Tune ends with its driver, and our sweeps go on from
another one. So nothing of Tune is saved or restored, and its own retries, loggers and signal handlers are off.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tune_sparse.config import CS3, CS3_TRIAL, SweepConfig
from tune_sparse.sweep.nodes import check_head
from tune_sparse.sweep.resources import available_cores

if TYPE_CHECKING:
    from ray.tune import Callback
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

    from tune_sparse.sweep.tune_parts import Stop


def run_trials(
    trainable: type,
    searcher: Searcher,
    callback: Callback,
    stop: Stop | None = None,
    scheduler: TrialScheduler | None = None,
    at_once: int | None = None,
) -> None:
    """Run the trials that `searcher` suggests, on warm workers, until it has no more or `stop` has a reason.

    Each trial is {"trial": settings}, with the `resources` that it holds. Whoever wants a failed one tried again
    suggests it once more. at_once: trials at once, where the searcher does not bound them itself.
    """
    from ray import tune

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([config["trial"]["resources"]])

    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(sys.maxsize)  # the searcher alone says how many there are
    with tempfile.TemporaryDirectory(prefix="tune-sparse-") as scratch:
        tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=at_once,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                callbacks=[callback],
                stop=stop,
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
def ray_session(config: SweepConfig) -> Iterator[int]:
    """Ray on this machine, or on the cluster that RAY_ADDRESS names; yields how many trials run at once."""
    set_environment()
    import ray

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are ours to report
    if "RAY_ADDRESS" not in os.environ:
        threads = config.protocol.threads
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
        yield _trials_at_once(config)
    finally:
        with _no_garbage():
            ray.shutdown()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect garbage before the block, and none in it.

    Tune leaves cycles that hold references to Ray's objects. A thread that collected one while Ray shuts down, such as
    the tracker's, would ask a worker that is gone, and Ray ends the process for that.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def set_environment() -> None:
    """Have Ray leave progress, records and signals to us. To be called before the first import of Ray."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # A trial that asks for no GPU must see none: it would compute there unasked.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "1"
    if "ray" not in sys.modules:  # set later, it would part this process from the cluster that it starts
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _trials_at_once(config: SweepConfig) -> int:
    available = capacity()
    workers = int(available.get("CPU", 0) // config.protocol.threads)
    gpus = 1.0 if config.gpus_per_trial is None else config.gpus_per_trial
    if gpus:
        workers = min(workers, int(available.get("GPU", 0) / gpus))
    return min(workers, config.workers or workers)


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM give `stop` its reason, so that running trials end and nothing half-written stays.

    A second SIGINT interrupts at once. Ray takes the signals for itself when it starts: enter this after it.
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
