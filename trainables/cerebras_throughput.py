"""How fast a cell trains on Cerebras, by batch size: a few real steps on the target that was asked for, or, of a CS-3,
the estimate that its compiler makes without training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from trainables.cerebras_backend import (
    TrainingJob,
    failure_of,
    job_labels,
    launch,
    starting_weights,
    stream_steps,
    tell_stages_apart,
    update_masks,
)
from trainables.finetuning import setup
from trainables.pruning_stage import Pruned
from trainables.run_log import RunLog
from trainables.throughput import Throughput, timed_run
from trainables.training import Training
from trainables.worker import WorkerCache
from tune_sparse.cerebras.environment import check_cluster
from tune_sparse.cerebras.guard import Ended, SupervisedProcess
from tune_sparse.cerebras.job import examples_in_order, write_job
from tune_sparse.cerebras.stages import read_stages
from tune_sparse.config import Cerebras
from tune_sparse.config.cerebras import UNTRAINED_TARGETS
from tune_sparse.errors import InputError, RunError
from tune_sparse.files import read_json
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import prunable_weights

POLL_SECONDS = 0.1


def check_measurable(settings: Cerebras, compile_only: bool) -> None:
    """Raise `InputError` for a target that trains nothing, has no estimate, or is not there."""
    if settings.cerebras_target in UNTRAINED_TARGETS:
        raise InputError(
            f"a rate needs a target that trains, {settings.cerebras_target} trains nothing. Give "
            "--cerebras-target csx or cpu."
        )
    if compile_only and settings.cerebras_target != "csx":
        raise InputError(
            f"only the compiler of a CS-3 makes an estimate, the target is {settings.cerebras_target}. Give "
            "--cerebras-target csx, or leave --compile-only out."
        )
    if settings.cerebras_target == "csx":
        check_cluster()


def measure_on_cerebras(
    run: Run, worker: WorkerCache, batch_size: int, settings: Cerebras, results: Path, compile_only: bool = False
) -> Throughput:
    """Train as `trainables.throughput.measure` does, there. What fails at one batch size is a row with its problem."""
    run = timed_run(run, batch_size)
    folder = results / "throughput" / "jobs" / f"{run.run_id}_b{batch_size}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = _write(run, worker, folder, settings, results, compile_only)
    handle = launch(job)
    try:
        if compile_only:
            _wait(handle, folder)
            training = Training()
        else:
            training = _trained(run, worker, folder, handle)
    except (RunError, ConnectionError) as error:
        return Throughput(batch_size, None, None, None, problem=str(error))
    finally:
        handle.stop()
    return _throughput(batch_size, training, folder, is_csx=settings.cerebras_target == "csx")


def _write(
    run: Run, worker: WorkerCache, folder: Path, settings: Cerebras, results: Path, compile_only: bool
) -> TrainingJob:
    loaded = worker.model(run)
    examples = worker.examples(run, loaded)
    masks = worker.pruner.make_into(run, loaded, examples.train)
    pruned = Pruned(masks, masks.sha256, prunable_weights(loaded.model))
    trainable = setup(run.cell.mode, loaded.model, run.protocol, update_masks(run, pruned), run.draw_seed)
    labels = job_labels(results, run) if settings.cerebras_target == "csx" else []
    write_job(
        folder,
        examples_in_order(examples.train, run.protocol, run.draw_seed, settings.bucket_tokens),
        starting_weights(run, trainable, pruned),
        run.protocol,
        run.draw_seed,
        settings,
        labels,
        compile_only=compile_only,
    )
    trainable.unwrap()
    label = labels[0] if labels else None
    return TrainingJob(folder, run.model_path, run.model_fingerprint, run.protocol.threads, settings, label)


def _trained(run: Run, worker: WorkerCache, folder: Path, handle: SupervisedProcess) -> Training:
    (folder / "steps").mkdir()
    log = RunLog(folder / "steps")
    examples = worker.examples(run, worker.model(run))
    try:
        return _ended_value(stream_steps(run, examples, folder, handle, log, lambda loss: None))
    finally:
        log.close()


def _ended_value(steps: Generator[Any, None, Training]) -> Training:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            training: Training = stop.value
            return training


def _wait(handle: SupervisedProcess, folder: Path) -> Ended:
    """Wait for the end of a compile. Raises what kept it from ending well."""
    while (ended := handle.ended()) is None:
        time.sleep(POLL_SECONDS)
    if ended.why != "ended" or ended.returncode:
        raise failure_of(ended, folder, 0)
    return ended


def _throughput(batch_size: int, training: Training, folder: Path, is_csx: bool) -> Throughput:
    if not is_csx:
        return Throughput.of(batch_size, training, read_json(folder / "report.json")["peak_memory_bytes"])
    stages = read_stages((folder / "child.log").read_text(errors="replace"))
    if training.steps:
        tell_stages_apart(training, stages, None)
    # No peak: the wafer does not say, and the process here holds nothing of the model.
    return Throughput.of(batch_size, training, None, stages.estimated_examples_per_second)
