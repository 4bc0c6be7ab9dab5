"""The training stage of a cell on Cerebras: written as files, run by the site's environment, read back and checked.

What comes before and after, pruning, merging, scoring and validating, is that of every backend.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor

from trainables.cerebras_tries import note_lost, prepare_try, waiting_seconds
from trainables.loaded import Examples
from trainables.lora_finetuning import LoraFinetuning
from trainables.masked_finetuning import MaskedFinetuning
from trainables.mode import TrainableModel
from trainables.pruning_stage import Pruned
from trainables.run_log import RunLog
from trainables.training import WARM_UP_STEPS, Training
from tune_sparse.cerebras.appliance import name_label, results_label, run_label
from tune_sparse.cerebras.conversion import check_convertible, to_cerebras
from tune_sparse.cerebras.environment import check_cluster, find_environment
from tune_sparse.cerebras.failures import ApplianceError, classify_failure
from tune_sparse.cerebras.guard import Ended, SupervisedProcess
from tune_sparse.cerebras.job import (
    CHILD,
    TRAINED,
    TRAINED_MASKS,
    Start,
    examples_in_order,
    longest_tokens,
    new_lines,
    padded_tokens,
    trained_adapters,
    trained_masks,
    trained_weights,
    write_job,
)
from tune_sparse.cerebras.sparsity import ChangingMasks
from tune_sparse.cerebras.stages import Stages, read_stages
from tune_sparse.config import Cerebras
from tune_sparse.errors import RunError
from tune_sparse.files import read_json, write_json
from tune_sparse.identity import hash_json
from tune_sparse.ledger.contracts import RunStore
from tune_sparse.ledger.run import Run
from tune_sparse.lora.layer import sparse_lora_layers
from tune_sparse.models.architectures import list_matrices
from tune_sparse.models.checkpoints import find_folder
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.model_zoo import cerebras_name
from tune_sparse.modes import MODES
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.masks import Masks
from tune_sparse.training.budgets import Budgets
from tune_sparse.training.loop import Step, accelerator_for, batches, learning_rate_at, mean_loss

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Tolerance:
    """How far a first loss may be from the pruned model's loss here: the larger of a fraction of it and a number."""

    fraction: float
    at_least: float = 0.0

    def of(self, loss: float) -> float:
        return max(self.fraction * loss, self.at_least)


FIRST_LOSS_TOLERANCE = {"float32": Tolerance(1e-3), "bfloat16": Tolerance(3e-2, 1e-2)}
"""A dense checkpoint in place of the pruned one, a lost rotary base, a mask on the wrong matrix would all show.
A wafer computes in half precision whatever the protocol says: its logits, of some tens, are known to about 0.1, which
moves the mean loss of a few tokens by about 0.01, however small it is."""


@dataclass(frozen=True)
class TrainingJob:
    """A training that is written in `folder`, to be launched where the Cerebras environment is."""

    folder: Path
    model_path: str
    model_fingerprint: str
    threads: int
    settings: Cerebras
    label: str | None
    """of its appliance jobs; None where there is no appliance"""


class JobHandle(Interface):
    """A training that was launched, or waits for a CS-3."""

    def ended(self) -> Ended | None:
        """How it ended, or None while it waits or runs. Raises what kept it from beginning."""

    def stop(self) -> None:
        """Give back what it holds and ask for its end, without waiting."""


Launcher = Callable[[TrainingJob], JobHandle]


def launch(job: TrainingJob) -> SupervisedProcess:
    """Begin a training on this machine. Raises `InputError` or `RunError` for what keeps it from beginning."""
    environment = find_environment()
    if job.settings.cerebras_target == "csx":
        check_cluster(job.settings)
    model = find_folder(job.model_path)
    check_convertible(model)
    converted = to_cerebras(model, job.model_fingerprint, environment)
    base = {"config": str(converted.config), "checkpoint": str(converted.checkpoint)}
    write_json(job.folder / "base.json", base)
    command = [str(environment.python), str(CHILD), str(job.folder.resolve())]
    limit = job.settings.train_timeout_seconds
    return SupervisedProcess(job.folder, command, environment.variables(job.threads), job.label, limit)


@dataclass(frozen=True)
class CerebrasTraining:
    """Trains a cell's adapters on Cerebras, and puts them into the model here, which is scored."""

    settings: Cerebras
    launcher: Launcher = launch

    def __call__(
        self,
        run: Run,
        trainable: TrainableModel,
        pruned: Pruned,
        examples: Examples,
        budgets: Budgets,
        ledger: RunStore,
        log: RunLog,
    ) -> Generator[Step | None, None, Training]:
        """Yield None while it waits. Raises `RunError` for what would come again, `ApplianceError` for the rest."""
        folder, seed, protocol = job_folder(ledger, run.run_id), run.draw_seed, run.own_protocol
        restart = prepare_try(folder)
        labels = job_labels(ledger.folder, run) if self.is_csx else []
        start = replace(starting_weights(run, trainable, pruned), changing=ChangingMasks.from_run(run))
        tokens = examples_in_order(examples.train, protocol, seed, self.settings.bucket_tokens)
        write_job(folder, tokens, start, protocol, seed, self.settings, labels, restart)
        first_batch = next(batches(examples.train, protocol, seed))
        accelerator = accelerator_for(trainable.mixed_precision)
        first = mean_loss(trainable.model, first_batch, protocol, accelerator, budgets)
        log(f"the training is written in {folder}, the pruned model's loss on the first examples is {first:.4f}")
        log("there, budgets and eval_every have no effect: a step is whole, no loss is measured in between")
        if start.changing:
            log("there, masks on the way are not read back: no dynamics are recorded")
        if restart:
            log(f"goes on after step {restart['step']} of a training that was lost")
        if self.is_csx:
            yield from wait_before_try(folder, log)

        label = labels[0] if labels else None
        job = TrainingJob(folder, run.model_path, run.model_fingerprint, run.protocol.threads, self.settings, label)
        handle = self.launcher(job)
        try:
            check_first = self.check_first_loss(first, run.protocol.precision)
            training = yield from stream_steps(run, examples, folder, handle, log, check_first)
        except ConnectionError:
            note_lost(folder)
            raise
        finally:
            handle.stop()
        _read_back_into(trainable, run, pruned, folder, log)
        padded = padded_tokens(longest_tokens(examples.train), self.settings.bucket_tokens)
        training.appliance = {"sparsity_annotation": self.settings.sparsity_annotation, "padded_tokens": padded}
        if self.is_csx:
            tell_stages_apart(training, read_stages((folder / "child.log").read_text(errors="replace")), restart)
        return training

    @property
    def is_csx(self) -> bool:
        """Whether it trains on a wafer, behind a queue and a compiler."""
        return self.settings.cerebras_target == "csx"

    def check_first_loss(self, first: float, precision: str) -> Callable[[float], None]:
        """Make a check that raises `RunError` for a first loss that is not that of the pruned model."""
        tolerance = FIRST_LOSS_TOLERANCE["bfloat16" if self.is_csx else precision].of(first)

        def check(loss: float) -> None:
            if not abs(loss - first) <= tolerance:
                raise RunError(
                    f"the model that trains on Cerebras must be the pruned one: its first loss must be {first:.5f} "
                    f"within {tolerance:.1g}, got {loss:.5f}. Remove the conversion from the cache and try again."
                )

        return check


def train_stage(
    run: Run,
    trainable: TrainableModel,
    pruned: Pruned,
    examples: Examples,
    budgets: Budgets,
    ledger: RunStore,
    log: RunLog,
) -> Generator[Step | None, None, Training]:
    """The training stage of the Cerebras backend, launched on this machine."""
    assert run.cerebras is not None
    training = CerebrasTraining(Cerebras(cerebras_target=run.cerebras["target"]))
    return (yield from training(run, trainable, pruned, examples, budgets, ledger, log))


def job_folder(ledger: RunStore, run_id: str) -> Path:
    """Name the folder where a training is written and followed; its log stays there."""
    return ledger.folder / "cerebras" / run_id


def job_labels(results_dir: Path, run: Run) -> list[str]:
    """Return the labels of a run's jobs: the one by which they alone are found, that of the results, one for people."""
    results = hash_json(str(results_dir.resolve()))
    return [run_label(results, run.identity), results_label(results), name_label(run.run_id)]


def update_masks(run: Run, pruned: Pruned) -> Masks:
    """Return what masks the update: there it is (W != 0), which leaves out a kept weight that happens to be 0."""
    if not MODES[run.cell.mode].masks_update:
        return pruned.masks
    return BitMasks.pack((name, mask & (pruned.weights[name] != 0)) for name, mask in pruned.masks.items())


def starting_weights(run: Run, trainable: TrainableModel, pruned: Pruned) -> Start:
    """Return the state that a cell's training begins with."""
    updated = pruned.weights if run.updates_weights or run.level_before else {}
    masks_update = MODES[run.cell.mode].masks_update
    return Start(pruned.masks, updated, _adapters(trainable), masks_update, _head_dim(trainable), run.cell.sparsity)


def _adapters(trainable: TrainableModel) -> dict[str, tuple[Tensor, Tensor]]:
    """{matrix: its own A and B}, nothing where the matrices themselves are trained."""
    if not isinstance(trainable, LoraFinetuning):
        return {}
    return {name: layer.factors()[:2] for name, layer in sparse_lora_layers(trainable.adapted)}


def stream_steps(
    run: Run, examples: Examples, folder: Path, handle: JobHandle, log: RunLog, check_first: Callable[[float], None]
) -> Generator[Step | None, None, Training]:
    """Yield each step as it is reported, and None between, until the training has ended well."""
    training, protocol = Training(), run.own_protocol
    upcoming = batches(examples.train, protocol, run.draw_seed)
    before, read = math.nan, 0
    while True:
        ended = handle.ended()  # asked first: what it wrote until then is read below
        lines, read = new_lines(folder / "metrics.jsonl", read)
        for line in lines:
            if line["step"]:
                batch = next(upcoming)
                tokens = sum(len(example.context) + len(example.continuation) for example in batch)
                rate = learning_rate_at(line["step"] - 1, protocol)
                step = Step(line["step"], line["loss"], rate, len(batch), tokens, line["at"] - before)
                _check_loss(step)
                if step.step == 1:
                    check_first(step.loss)
                training.add(step, cold=step.step <= WARM_UP_STEPS)
                log.metrics(step=step.step, train_loss=step.loss, learning_rate=rate)
                yield step
            before = line["at"]
        if ended is not None:
            break
        yield None
        time.sleep(POLL_SECONDS)
    if ended.why != "ended" or ended.returncode:
        raise failure_of(ended, folder, protocol.steps)
    if training.steps != protocol.steps:
        raise RunError(f"a training must report its {protocol.steps} steps, got {training.steps}. See {folder}")
    return training


def tell_stages_apart(training: Training, stages: Stages, restart: Mapping[str, Any] | None) -> None:
    """Take queue, compiling and programming out of the seconds of the first step, which waited for them."""
    before = stages.seconds_before_training
    training.seconds -= before
    if not restart or restart["step"] < WARM_UP_STEPS:
        training.cold_seconds -= before
    training.appliance |= stages.measured()


def wait_before_try(folder: Path, log: RunLog) -> Generator[None]:
    """Yield None until the next try may begin: while it waits, it holds no CS-3."""
    if seconds := waiting_seconds(folder):
        log(f"waits {seconds:.0f} s: the last try was lost")
    while waiting_seconds(folder):
        yield None
        time.sleep(POLL_SECONDS)


def _check_loss(step: Step) -> None:
    if not math.isfinite(step.loss):
        raise RunError(f"the training loss must stay finite, got {step.loss} at step {step.step}. Lower learning_rate.")


def failure_of(ended: Ended, folder: Path, steps: int) -> Exception:
    """Return the error of a training that did not end well, and what became of its jobs on the appliance."""
    log = folder / "child.log"
    error: Exception
    if ended.why == "timeout":
        error = RunError(f"{steps} steps must end within train_timeout_seconds, they did not. Raise it. See {log}")
    elif ended.why != "ended":
        error = ApplianceError(f"the training was {ended.why}. See {log}")
    else:
        error = classify_failure(log, ended.returncode)
    if ended.cancelled.problem is None:
        return error
    return type(error)(f"{error}; on the appliance: {ended.cancelled.summary()}. Look with `csctl get jobs`")


def _read_back_into(trainable: TrainableModel, run: Run, pruned: Pruned, folder: Path, log: RunLog) -> None:
    """Check what was trained, and put it into the model here."""
    report = read_json(folder / "report.json")
    ended = _masks_read_into(trainable, run, folder) or pruned.masks
    _check_unchanged(report, run, pruned, ended)
    if MODES[run.cell.mode].has_adapter:
        _write_adapters_into(trainable, folder)
    else:
        _write_weights_into(trainable, folder)
    for name in (TRAINED, TRAINED_MASKS):  # what the run saves itself is what stays
        (folder / name).unlink(missing_ok=True)
    (folder / "lost.json").unlink(missing_ok=True)
    log(f"trained by release {report['release']}: {_zeros(run, sum(report['zeros'].values()))}")


def _zeros(run: Run, count: int) -> str:
    """Say what is known of the zeros: a wafer is not asked for frozen weights, which are those that were sent."""
    assert run.cerebras is not None
    if run.cerebras["target"] == "csx" and MODES[run.cell.mode].has_adapter:
        return f"{count} zeros were sent in frozen weights, which a wafer is not asked to give back"
    return f"{count} zeros stayed zero"


def _masks_read_into(trainable: TrainableModel, run: Run, folder: Path) -> BitMasks | None:
    """Put the masks that a training ended with into what was trained, and return them; None where they stay.

    A matrix without a pruned weight has the mask that it had.
    """
    if not run.updates:
        return None
    assert isinstance(trainable, MaskedFinetuning)
    found = BitMasks.pack(trained_masks(folder, _head_dim(trainable))).to(trainable.model.device)
    began = trainable.current.now
    trainable.current.now = BitMasks({**began.bits, **found.bits}, began.shapes, {**began.kept, **found.kept})
    return trainable.current.now


def _check_unchanged(report: dict[str, Any], run: Run, pruned: Pruned, masks: BitMasks) -> None:
    """Raise `RunError` unless the frozen weights are what they were, and every zero is one still."""
    found = [f"{name}: the frozen weight must not change in training" for name in report["changed"]]
    is_frozen = MODES[run.cell.mode].has_adapter
    for name, mask in masks.items():
        wanted = int((pruned.weights[name] == 0).sum() if is_frozen else (~mask).sum())
        counted = report["zeros"].get(cerebras_name(name))
        if counted != wanted and (counted is not None or not mask.all()):
            found.append(f"{name}: {wanted} weights must be 0 after the training, got {counted}")
    if report["steps"] != (steps := run.own_protocol.steps):
        found.append(f"{steps} steps must be trained, got {report['steps']}")
    if found:
        raise RunError("a training on Cerebras must leave the base alone: " + "; ".join(found))


@torch.no_grad()
def _write_adapters_into(trainable: TrainableModel, folder: Path) -> None:
    trained, own = trained_adapters(folder, _head_dim(trainable)), _adapters(trainable)
    if trained.keys() != own.keys():
        raise RunError(f"the trained adapter must have a lora_A and a lora_B for each matrix, see {folder}")
    for name, factors in own.items():
        for factor, found in zip(factors, trained[name], strict=True):
            factor.copy_(found)


@torch.no_grad()
def _write_weights_into(trainable: TrainableModel, folder: Path) -> None:
    written = set()
    for name, weight in trained_weights(folder, _head_dim(trainable)):
        trainable.model.get_parameter(name).copy_(weight)
        written.add(name)
    missing = {matrix.name for matrix in list_matrices(trainable.model)} - written
    if missing:
        raise RunError(f"every matrix must have been trained, {sorted(missing)} were not, see {folder}")


def _head_dim(trainable: TrainableModel) -> int:
    return ModelDims.from_config(trainable.model.config).head_dim
