"""A cell on a CPU or a GPU: prune, train, deploy, score, validate, record."""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainables import dense, masked_finetuning, sparse_to_dense, sparse_to_sparse
from trainables.cerebras_backend import CerebrasTraining, confining_masks
from trainables.deployed import Deployed
from trainables.hardware import device, environment, gpu_memory_bytes, peak_memory_bytes, reset_peak_memory
from trainables.inputs import load_planned_checkpoint, load_planned_splits
from trainables.mode import Trainee
from trainables.pruned import Pruned, Pruner
from trainables.training import Training, train
from tune_sparse.config import Cerebras
from tune_sparse.data.splits import Encoded, encode_training
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import DISK_FULL, NotReadyError, RunError
from tune_sparse.evaluation.flops import SEQUENCE_LENGTHS, inference_flops, training_flops
from tune_sparse.evaluation.metrics import Metrics, primary_metric
from tune_sparse.evaluation.outcomes import write_outcomes
from tune_sparse.evaluation.scoring import EvalSet, Scored, encode_test, score
from tune_sparse.evaluation.validation import validation_report, weights_sha256
from tune_sparse.files import write_json, write_text
from tune_sparse.ledger.contracts import RunStore
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run, write_config
from tune_sparse.lora.layer import lost_fraction
from tune_sparse.models.checkpoints import load_model, load_tokenizer, prunable_weights, write_weights_into
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.masks import count_sparsity
from tune_sparse.training.loop import Step, accelerator_for, mean_loss
from tune_sparse.watchdog import heartbeat

MODES = {
    "dense": dense,
    "sparse-to-dense": sparse_to_dense,
    "sparse-to-sparse": sparse_to_sparse,
    "masked-finetuning": masked_finetuning,
}

INFRASTRUCTURE_ERRORS = (
    torch.OutOfMemoryError,
    torch.AcceleratorError,
    MemoryError,
    ConnectionError,
    TimeoutError,
    NotReadyError,  # of this node: another one may have the model or the rows
)
# safetensors and torch's CPU allocator give their own classes to what the system said.
INFRASTRUCTURE_MESSAGES = (*DISK_FULL, "Stale file handle", "Input/output error", "DefaultCPUAllocator")


@dataclass(frozen=True)
class Rows:
    """A task's rows as one model's tokens."""

    train: list[Encoded]
    selection: list[Encoded]
    tests: tuple[EvalSet, ...]


@dataclass(frozen=True)
class Loaded:
    """One model in memory, with the weights that pruning and merging overwrite."""

    key: tuple[str, str]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dims: ModelDims
    dense_weights: dict[str, Tensor]


class Bench:
    """What a worker keeps between cells: one model with its dense_weights weights, and its tasks' tokens."""

    def __init__(self) -> None:
        self.loads = 0
        self._loaded: Loaded | None = None
        self._rows: dict[tuple[Any, ...], Rows] = {}
        self.pruner = Pruner()

    def lend(self, run: Run) -> Loaded:
        """The run's model, its weights as in the checkpoint. It is loaded only if another one lay here."""
        key = (run.model_fingerprint, run.protocol.precision)
        if self._loaded is None or self._loaded.key != key:
            self.clear()
            self._loaded = _load(run, key)
            self.loads += 1
        write_weights_into(self._loaded.model, self._loaded.dense_weights)
        return self._loaded

    def clear(self) -> None:
        """Forget the model: it may have been left half-changed, or another one is wanted."""
        self._loaded, self._rows, self.pruner = None, {}, Pruner()
        gc.collect()

    def rows(self, run: Run, loaded: Loaded) -> Rows:
        """The rows of the task, or of all tasks of a mixture, encoded once."""
        key = (run.cell.task, run.data_fingerprint, run.prompt_version, run.protocol)
        if key not in self._rows:
            self._rows[key] = _encode(run, loaded)
        return self._rows[key]


def _encode(run: Run, loaded: Loaded) -> Rows:
    tokenizer, protocol = loaded.tokenizer, run.protocol.within(loaded.dims.max_positions)
    tasks, splits = tasks_named(run.cell.task), load_planned_splits(run, protocol)
    train, selection = [], []
    for task, split in zip(tasks, splits, strict=True):
        train += encode_training(tokenizer, task, split.train, protocol.max_tokens, protocol.n_train)
        selection += encode_training(tokenizer, task, split.selection, protocol.max_tokens, protocol.n_selection)
    tests = (
        encode_test(tokenizer, task, split.test, protocol, split.examples)
        for task, split in zip(tasks, splits, strict=True)
    )
    return Rows(train, selection, tuple(tests))


def _load(run: Run, key: tuple[str, str]) -> Loaded:
    checkpoint = load_planned_checkpoint(run)
    model = load_model(checkpoint.path, getattr(torch, run.protocol.precision), device())
    dense_weights = {name: weight.clone() for name, weight in prunable_weights(model).items()}
    return Loaded(key, model, load_tokenizer(checkpoint.path), checkpoint.dims, dense_weights)


Stage = Callable[[Run, Trainee, Pruned, Rows, RunStore, "Log"], Generator[Step | None, None, Training]]
"""Trains a trainee in place, wherever that is computed."""


def train_here(
    run: Run, trainee: Trainee, pruned: Pruned, rows: Rows, ledger: RunStore, log: Log
) -> Generator[Step | None, None, Training]:
    """The training stage of the backend torch."""
    return (yield from train(run, trainee, rows.train, rows.selection, ledger.checkpoint(run.run_id), log))


def run_cell(
    run: Run, ledger: RunStore, bench: Bench, stage: Stage | None = None, held: Mapping[str, float] | None = None
) -> Generator[Step | None, None, Record]:
    """Train and score one cell into the ledger, yielding each optimizer step, and None while one is waited for.

    stage: of the training; by default that of the cell's backend, on this machine.
    held: what the trial holds of Ray's resources, to be recorded.

    An error that would come again is recorded as a failed run; an infrastructure error is raised.
    """
    with ledger.writing(run.run_id) as folder:
        write_config(folder, run)
        with closing(Log(folder)) as log:
            try:
                stage = stage or (CerebrasTraining(Cerebras(run.cerebras["target"])) if run.cerebras else train_here)
                metrics, measured = yield from _stages(run, ledger, bench, folder, log, stage)
                measured |= {"held": dict(held)} if held else {}
                record = Record(run.run_id, run.identity, "done", metrics, measured, run_environment(run))
            except BaseException as error:
                bench.clear()
                if not isinstance(error, Exception) or is_infrastructure(error):
                    raise
                log(f"failed: {error}")
                described = describe_error(error, retryable=False)
                record = Record(run.run_id, run.identity, "failed", environment=run_environment(run), error=described)
        write_text(folder / "git_sha.txt", f"{environment()['git_sha'] or 'unknown'}\n")
        write_json(folder / "result.json", asdict(record))
    ledger.checkpoint(run.run_id).unlink(missing_ok=True)
    return record


def run_environment(run: Run) -> dict[str, Any]:
    """Where a run was trained and scored; what trained it on Cerebras is not what scored it."""
    here = environment()
    if run.cerebras is None:
        return here
    trained = {"trained_on": f"cerebras {run.cerebras['target']} {run.cerebras['release']}"}
    return here | trained | ({"hardware": "CS-3"} if run.cerebras["target"] == "csx" else {})


def is_infrastructure(error: Exception) -> bool:
    """Whether a run may go well another time or elsewhere; every other error would come again in the same way."""
    said = str(error)
    return isinstance(error, INFRASTRUCTURE_ERRORS) or any(message in said for message in INFRASTRUCTURE_MESSAGES)


def describe_error(error: BaseException, retryable: bool) -> dict[str, Any]:
    return {
        "class": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "retryable": retryable,
    }


class Log:
    """The run's own log: lines with the seconds since its start."""

    def __init__(self, folder: Path) -> None:
        self.started = time.perf_counter()
        self._log = (folder / "train.log").open("w", buffering=1)
        self._metrics = (folder / "metrics.jsonl").open("w", buffering=1)

    def __call__(self, text: str) -> None:
        heartbeat()
        self._log.write(f"{self.seconds():9.3f} {text}\n")

    def metrics(self, **values: float | int) -> None:
        self._metrics.write(json.dumps(values, allow_nan=False) + "\n")

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def close(self) -> None:
        self._log.close()
        self._metrics.close()


def _stages(
    run: Run, ledger: RunStore, bench: Bench, folder: Path, log: Log, stage: Stage
) -> Generator[Step | None, None, tuple[dict[str, Any], dict[str, Any]]]:
    """Prune, train, merge, score and validate; returns (deterministic metrics, measured values)."""
    cell, protocol = run.cell, run.protocol
    torch.set_num_threads(protocol.threads)
    reset_peak_memory()
    loaded = bench.lend(run)
    model, tokenizer = loaded.model, loaded.tokenizer
    rows = bench.rows(run, loaded)
    log(
        f"model and rows ready: {len(rows.train)} train, {len(rows.selection)} selection, "
        f"{sum(len(test.examples) for test in rows.tests)} test"
    )

    pruned = bench.pruner.prune(run, loaded, rows.train)
    write_weights_into(model, pruned.weights)
    write_json(folder / "sparse_config.json", pruned.sparse_config(run))
    pruned_baseline = _pruned_baseline(run, ledger, lambda: score(model, tokenizer, rows.tests, protocol))
    judged_by = primary_metric(pruned_baseline)
    log(f"pruned to {count_sparsity(pruned.masks):.4f}, {judged_by} before tuning {pruned_baseline[judged_by]:.4f}")

    masks = confining_masks(run, pruned) if run.cerebras else pruned.masks
    adapted = {"modules": run.super_adapter.space.modules} if run.super_adapter else {}
    trainee = MODES[cell.mode].begin(model, protocol, masks, cell.seed, **adapted)
    log(trainee.summary())
    trained_rows = [(len(row.context) + len(row.continuation), len(row.continuation)) for row in rows.train]
    step_flops: int | None = None  # of a super-adapter unknown: its steps train slices of different sizes
    if run.super_adapter is None:
        flops = training_flops(pruned.masks, loaded.dims, trained_rows, protocol.lora_rank, trainee.trains_factors)
        step_flops = round(flops * protocol.global_batch_size / len(rows.train))
    training = yield from stage(run, trainee, pruned, rows, ledger, log)
    trainee.save(folder)

    deployed = trainee.deploy()
    rounded_away = _rounded_away(trainee, deployed, pruned)
    violations = trainee.violations(pruned.weights)
    with accelerator_for(trainee.mixed_precision).autocast():
        trained = _outputs(trainee.model, rows.train[: protocol.micro_batch_size])
    is_exact, model = trainee.is_merged_exactly, trainee.plain_model()
    write_weights_into(model, pruned.weights | deployed.trained)
    merged = _outputs(model, rows.train[: protocol.micro_batch_size])
    violations += _merge_violations(trained, merged, is_exact)

    before_mask: Scored | None = None
    if deployed.final is not None:
        before_mask = score(model, tokenizer, rows.tests, protocol)
        write_outcomes(folder / "examples_before_merge.parquet", before_mask.outcomes)
        write_weights_into(model, pruned.weights | deployed.final)
    scoring_started = time.perf_counter()
    scored = score(model, tokenizer, rows.tests, protocol)
    scoring_seconds = time.perf_counter() - scoring_started
    write_outcomes(folder / "examples.parquet", scored.outcomes)
    log(f"{judged_by} {scored.metrics[judged_by]:.4f}")

    report = validation_report(prunable_weights(model), pruned.masks, cell.sparsity, pruned.checksum, violations)
    write_json(folder / "validation_report.json", report)
    if not report["all_valid"]:
        raise RunError("a run must pass its validation: " + "; ".join(report["violations"]))

    metrics = (
        scored.metrics
        | {
            f"{judged_by}_before_tuning": pruned_baseline[judged_by],
            f"{judged_by}_before_merge": before_mask.metrics[judged_by] if before_mask else None,
            "by_task": scored.by_task if len(scored.by_task) > 1 else None,
            "actual_sparsity": report["actual_sparsity"],
            "mask_sha256": pruned.checksum,
            "weights_sha256": weights_sha256(prunable_weights(model)),
            "train_loss": training.last_loss,
            "eval_loss": mean_loss(model, rows.selection, protocol),
            "epochs": training.rows / len(rows.train),
            "update_rounded_away_fraction": rounded_away,
            "train_step_flops": step_flops,
            "inference_flops": {str(t): inference_flops(pruned.masks, loaded.dims, t) for t in SEQUENCE_LENGTHS},
        }
        | deployed.metrics
    )
    measured = {
        "trial_seconds": log.seconds(),
        "train_seconds": training.seconds,
        **training.rates(),
        "seconds_to_best_eval_loss": training.seconds_to_best_eval_loss,
        "inference_samples_per_second": len(scored.outcomes) / scoring_seconds,
        "compile_seconds": training.compile_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "gpu_memory_bytes": gpu_memory_bytes(),
    }
    return metrics, measured


def _pruned_baseline(run: Run, ledger: RunStore, compute: Callable[[], Scored]) -> Metrics:
    """Metrics of the pruned model before tuning, computed by whichever mode comes first."""
    known = ledger.pruned_baseline(run.pruned_baseline_id)
    if known is None:
        scored = compute()
        own = {"metrics": scored.metrics, "run_id": run.run_id, "environment": environment()}
        ledger.write_pruned_baseline(run.pruned_baseline_id, own, scored.outcomes)
        known = ledger.pruned_baseline(run.pruned_baseline_id)  # another worker may have been faster
        assert known is not None
    return known["metrics"]


def _rounded_away(trainee: Trainee, deployed: Deployed, pruned: Pruned) -> float:
    """The share of the update that adding it to the weights in their precision lost."""
    arrived = {name: weight.float() - pruned.weights[name].float() for name, weight in deployed.trained.items()}
    return lost_fraction(trainee.updates(pruned.weights), arrived)


def _merge_violations(trained: Tensor, merged: Tensor, exactly: bool) -> list[str]:
    """Whether two (tokens, vocabulary) logits are of one function: to the last bit, or but for rounding.

    Plain LoRA adds what W and BA each make of x, the merged model multiplies by their rounded sum. Of the digits of
    the precision, half must agree over all logits: |difference| <= sqrt(eps) |trained|.
    """
    if exactly:
        same = torch.equal(trained, merged)
        return [] if same else ["the merged model must compute exactly the trained function"]
    lost = float((merged.float() - trained.float()).norm() / trained.float().norm())
    limit = math.sqrt(torch.finfo(trained.dtype).eps)
    if lost <= limit:
        return []
    return [f"the merged model must compute the trained function within {limit:.1g} of its logits, got {lost:.2g}"]


@torch.no_grad()
def _outputs(model: Any, rows: list[Encoded]) -> Tensor:
    """Logits of every token of `rows`: (tokens, vocabulary). They differ if a weight computes differently."""
    texts = (torch.tensor([row.context + row.continuation], device=model.device) for row in rows)
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in texts])
