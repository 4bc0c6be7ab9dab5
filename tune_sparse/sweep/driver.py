"""A sweep: what the ledger lacks of a plan, run through one Ray Tuner on warm workers, and tracked."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from tune_sparse.cerebras.graphs import Graph
from tune_sparse.cerebras.preflight import prepare_cerebras
from tune_sparse.config import CS3, CS3_TRIAL, SweepConfig
from tune_sparse.config.axes import point_text
from tune_sparse.ledger.curves import KnownCurve, known_curves
from tune_sparse.ledger.lease import FolderLease
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import SweepRecord
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.cards import block_kinds, check_devices, cluster_devices
from tune_sparse.sweep.graphs import PlannedGraphs, plan_graphs
from tune_sparse.sweep.plan import Plan
from tune_sparse.sweep.preparation import check_start
from tune_sparse.sweep.progress import Progress
from tune_sparse.sweep.protocol_in_use import protocol_in_use, selection_warnings
from tune_sparse.sweep.ray_session import capacity, nodes, ray_session, run_trials, stop_on_signals
from tune_sparse.sweep.resources import Placement, trial_settings
from tune_sparse.sweep.retries import is_missing, memory_lines
from tune_sparse.sweep.wanted import WantedRuns, asked_of, check_budget, check_fixed
from tune_sparse.tracking.background import BackgroundTracker, track_sweep
from tune_sparse.tracking.sync import tracking_uri

logger = logging.getLogger(__name__)

SCARCEST_FIRST = ("cerebras", "torch")
"""Backends in the order in which they are offered what is free."""


@dataclass(frozen=True)
class SweepResult:
    """How a sweep went."""

    plan: Plan
    ran: int
    done: int
    failed: int
    stopped_early: int
    left: int
    stopped: str | None
    """Why the sweep ended early, if it did."""
    spent: str | None
    """Why no more was started, if that is its budget."""
    curves: tuple[KnownCurve, ...]
    """Of a sweep that finds."""
    seconds: float
    utilisation: float | None
    """Sum of trial seconds over (workers x wall seconds), or None if nothing ran."""

    @property
    def is_complete(self) -> bool:
        """Whether everything that was asked is done: each curve decided, or else each run ended as it should."""
        if self.curves:
            return all(curve.is_decided for curve in self.curves)
        return self.done + self.stopped_early == len(self.plan.runs)


def run_sweep(plan: Plan, retry_failed: bool = False, only: Collection[str] | None = None) -> SweepResult:
    """Run through Ray Tune what a prepared sweep lacks, and track it. Running it again resumes it.

    only: ids of the runs to run now; by default all that are missing.
    Raises `InputError` before any trial starts if anything is wrong with the input.
    """
    config = plan.config
    ledger, uri = Ledger(config.results_dir), tracking_uri(config)
    protocol = protocol_in_use(config, plan.examples)
    few = selection_warnings(config, plan.examples.counts)
    for line in [*protocol.lines(), *few, *memory_lines(plan.lacked_memory(ledger))]:
        logger.info(line)
    check_start(plan, ledger, plan.missing(ledger, retry_failed))
    check_budget(plan, ledger, plan.missing(ledger, retry_failed))
    started = time.perf_counter()
    with FolderLease(ledger.folder) as lease:
        ledger.remove_partial()
        record_stopped(plan, ledger)
        left = plan.missing(ledger, retry_failed)
        record = _keep_start(ledger, plan, is_whole=not left)
        ledger.write_sweep(record)
        missing = [run for run in left if only is None or run.run_id in only]
        done_before = len(plan.runs) - len(left)
        wanted = WantedRuns(plan, ledger, missing, everything=only is not None)
        progress = Progress(done_before + len(missing), done_before, wanted.describe if wanted.is_chosen else None)
        with track_sweep(ledger, uri, record) as tracker:
            stopped, workers = None, 1
            if wanted.has_next:
                graphs = _prepare_cerebras(plan, ledger, missing) if any(run.cerebras for run in missing) else {}
                stopped, workers = _tune(plan, ledger, wanted, graphs, progress, tracker, lease)
                if not lease.lost.is_set():
                    ledger.remove_partial()
            for line in wanted.lines() if not stopped else ():
                logger.info(line)
        seconds = time.perf_counter() - started
    return _result(plan, ledger, record, wanted, stopped, seconds, workers)


def _result(
    plan: Plan,
    ledger: Ledger,
    sweep: SweepRecord,
    wanted: WantedRuns,
    stopped: str | None,
    seconds: float,
    workers: int,
) -> SweepResult:
    records = {run_id: record for run_id in plan.runs if (record := ledger.record(run_id))}
    ran = [r for run in wanted.missing if (r := records.get(run.run_id)) and r.status == "done"]
    statuses, stopper = Counter(record.status for record in records.values()), plan.stopper(ledger)
    early = [r for r in records.values() if r.status == "stopped" and stopper and stopper.is_stopped(r.run_id)]
    trial_seconds = sum(record.measured["trial_seconds"] for record in ran)
    return SweepResult(
        plan=plan,
        ran=len(ran),
        done=statuses["done"],
        failed=statuses["failed"],
        stopped_early=len(early),
        left=len(plan.runs) - statuses["done"] - statuses["failed"] - len(early),
        stopped=stopped,
        spent=wanted.spent,
        curves=tuple(known_curves(sweep, records.get)) if plan.config.find else (),
        seconds=seconds,
        utilisation=trial_seconds / (workers * seconds) if ran else None,
    )


def record_stopped(plan: Plan, ledger: Ledger) -> None:
    """Record the runs that are stopped early by what the ledger knows: a driver was killed before it could, or other
    runs came to their rungs since."""
    stopper = plan.stopper(ledger)
    if stopper is None:
        return
    for run in filter(lambda run: stopper.is_stopped(run.run_id), plan.runs.values()):
        record = ledger.record(run.run_id)
        if is_missing(record) and record != stopper.record(run):
            ledger.write_record(run, stopper.record(run))


def _prepare_cerebras(plan: Plan, ledger: Ledger, missing: Sequence[Run]) -> dict[str, Graph]:
    """Make everything ready to train on Cerebras; returns the graph of each run where there is a compiler."""
    settings = plan.config.cerebras
    planned = plan_graphs(plan) if settings.cerebras_target == "csx" else PlannedGraphs({}, ())
    for line in planned.lines:
        logger.info(line)
    graphs = planned.distinct(missing)
    prepare_cerebras(plan.config, plan.checkpoints, graphs, ledger, report=logger.info)
    return planned.by_run


def _keep_start(ledger: Ledger, plan: Plan, is_whole: bool) -> SweepRecord:
    """The record of a sweep: started again, it keeps the time of its first start, and, while its matrix is not whole,
    how its runs were chosen. Raises `InputError` where other levels are compared than were fixed then."""
    record, asked = plan.record, asked_of(plan.config)
    for earlier in (sweep for sweep in ledger.sweeps() if sweep.sweep_id == record.sweep_id):
        record = replace(record, started=min(earlier.started, record.started))
        if earlier.chosen_by and asked and not is_whole:
            check_fixed(earlier.chosen_by, asked)
        asked = asked or earlier.chosen_by
    return replace(record, chosen_by=asked)


def _tune(
    plan: Plan,
    ledger: Ledger,
    wanted: WantedRuns,
    graphs: Mapping[str, Graph],
    progress: Progress,
    tracker: BackgroundTracker,
    lease: FolderLease,
) -> tuple[str | None, int]:
    """Run what is chosen through one Tuner; returns (why it ended early, if it did; workers)."""
    config, missing = plan.config, wanted.missing
    with ray_session(config) as workers, gathered(ledger, lease.token, missing):
        from trainables.cell import CellTrainable
        from tune_sparse.sweep.callbacks import LedgerCallback
        from tune_sparse.sweep.scheduler import ResourceQueue
        from tune_sparse.sweep.tune_parts import Stop

        placement, stop, stopper = Placement(config, nodes), Stop(), plan.stopper(ledger)
        hardware = {}
        for run in plan.runs.values():
            record = ledger.record(run.run_id)
            placement.learn(run, record)
            if record and record.status == "done":
                hardware[run.cell.model, run.cell.task] = str(record.environment.get("hardware"))
        placement.keep_on(block_kinds(config, missing, plan.dims, nodes(), hardware))
        placement.check_placeable(missing)
        check_devices(config, missing, plan.dims, cluster_devices(nodes()))

        def make_trial(run: Run) -> dict[str, Any]:
            trial = trial_settings(run, config, ledger.folder, placement) | {"token": lease.token}
            trial |= stopper.settings(run) if stopper else {}
            settings, graph = config.cerebras, graphs.get(run.run_id)
            if graph is not None:
                settings = replace(settings, bucket_tokens=(graph.tokens,))
            return trial | ({"cerebras": asdict(settings)} if run.cerebras else {})

        queues = wanted.sources(placement.queue, lambda name: SCARCEST_FIRST.index(name.split()[0]))
        queue = ResourceQueue(queues, make_trial, capacity, _limit(config), stop)
        callback = LedgerCallback(
            ledger,
            {run.run_id: run for run in missing},
            {cell["run_id"]: point_text(tuple(cell["axes"].items())) for cell in plan.record.cells},
            progress,
            tracker,
            lease,
            stop,
            placement,
            requeue=lambda run: queue.requeue(placement.queue(run), run),
            max_retries=config.max_retries,
            ended=lambda record: progress.say(*wanted.ended(record)),
            stopper=stopper,
        )
        with progress.shown(workers), stop_on_signals(stop):
            run_trials(CellTrainable, queue, callback, stop, stopper)
        if not lease.lost.is_set():
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
    from trainables.remote_ledger import check_visible, serve_ledger

    folder = ledger.folder.resolve()
    if any(run.cerebras for run in missing):
        check_visible(folder, token, "the backend cerebras needs", lambda held: bool({CS3, CS3_TRIAL} & held.keys()))
    with serve_ledger(folder, token):
        yield
