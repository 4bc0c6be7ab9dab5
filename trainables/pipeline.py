"""The pipeline of a cell, whatever its backend: prune, train, merge and check, score, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainables import cerebras_backend, torch_backend
from trainables.also_trained import scored_weights
from trainables.budgets import check_budgets, run_budgets
from trainables.failures import describe_error, may_pass
from trainables.finetuning import setup
from trainables.hardware import check_precision, environment
from trainables.inputs import load_planned_checkpoint
from trainables.loaded import Examples
from trainables.mask_schedule import MaskSchedule
from trainables.mode import MergeReport, TrainableModel
from trainables.peak_memory import PeakMemory
from trainables.pruning_stage import ENDED_MASKS, Pruned, Pruner
from trainables.record_metrics import measurements, pruning_metrics, score_metrics, training_metrics
from trainables.run_log import RunLog
from trainables.training import Training
from trainables.work import BeforeMask, Scores, Trained, Work
from trainables.worker import WorkerCache
from tune_sparse.data.batching import example_tokens, target_tokens
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import RunError
from tune_sparse.evaluation.flops import training_flops
from tune_sparse.evaluation.metrics import Metrics, score_name
from tune_sparse.evaluation.outcomes import write_outcomes
from tune_sparse.evaluation.validation import hashing, validation_report
from tune_sparse.files import write_json, write_text
from tune_sparse.ledger.contracts import RunStore
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run, write_config
from tune_sparse.lora.merging import mask_weights_into
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.pruning.calibration import calibration_line
from tune_sparse.pruning.mask_io import write_bits
from tune_sparse.pruning.masks import packed
from tune_sparse.schedules import mean_sparsity
from tune_sparse.training.budgets import Budgets
from tune_sparse.training.loop import Step

TrainStage = Callable[
    [Run, TrainableModel, Pruned, Examples, Budgets, RunStore, RunLog], Generator[Step | None, None, Training]
]
"""Trains a model in place, wherever that is computed."""
TRAIN_STAGES: dict[str, TrainStage] = {
    "torch": torch_backend.train_stage,
    "cerebras": cerebras_backend.train_stage,
}


def run_cell(
    run: Run,
    ledger: RunStore,
    worker: WorkerCache,
    train_stage: TrainStage | None = None,
    held: Mapping[str, float] | None = None,
) -> Generator[Step | None, None, Record]:
    """Train and score one cell into the ledger, yielding each optimizer step, and None while one is waited for.

    train_stage: by default that of the cell's backend, on this machine.
    held: what the trial holds of Ray's resources, to be recorded.

    An error that would come again is recorded as a failed run, also one of memory on a whole GPU; another
    infrastructure error is raised.
    """
    with ledger.writing(run.run_id) as folder:
        write_config(folder, run)
        with closing(RunLog(folder)) as log, closing(PeakMemory()) as memory:
            work = None
            try:
                work = _load(run, ledger, worker, folder, log, memory)
                stage = train_stage or TRAIN_STAGES[run.cell.backend]
                metrics, measured = yield from _stages(work, worker.pruner, stage)
                measured |= {"held": dict(held)} if held else {}
                record = Record(run.run_id, run.identity, "done", metrics, measured, run_environment(run))
            except BaseException as error:
                worker.clear()
                if not isinstance(error, Exception) or may_pass(error, held or {}):
                    raise
                log(f"failed: {error}")
                described = describe_error(error, retryable=False, budgets=work.budgets if work else None)
                record = Record(run.run_id, run.identity, "failed", environment=run_environment(run), error=described)
        write_text(folder / "git_sha.txt", f"{environment()['git_sha'] or 'unknown'}\n")
        write_json(folder / "result.json", asdict(record))
    ledger.checkpoint(run.run_id).unlink(missing_ok=True)
    return record


def run_environment(run: Run) -> dict[str, Any]:
    """Describe where a run was trained and scored; what trained it on Cerebras is not what scored it."""
    here = environment()
    if run.cerebras is None:
        return here
    trained = {"trained_on": f"cerebras {run.cerebras['target']} {run.cerebras['release']}"}
    return here | trained | ({"hardware": "CS-3"} if run.cerebras["target"] == "csx" else {})


def _load(run: Run, ledger: RunStore, worker: WorkerCache, folder: Path, log: RunLog, memory: PeakMemory) -> Work:
    torch.set_num_threads(run.protocol.threads)
    check_precision(run.protocol.precision)
    budgets = run_budgets(run, load_planned_checkpoint(run).dims)  # what is too large is refused before it is read
    loaded = worker.model(run)
    examples = worker.examples(run, loaded)
    log(
        f"model and examples ready: {len(examples.train)} train, {len(examples.selection)} selection, "
        f"{sum(len(test.examples) for test in examples.tests)} test; weights from {loaded.dense_weights.folder}"
    )
    check_budgets(budgets, examples, run.protocol.max_new_tokens)
    memory.end("load")
    return Work(run, ledger, folder, log, loaded, examples, budgets, memory)


def _stages(
    work: Work, pruner: Pruner, train_stage: TrainStage
) -> Generator[Step | None, None, tuple[dict[str, Any], dict[str, Any]]]:
    """The life of the one model, which begins dense: each stage, and each write into its weights, in order.

    Returns (deterministic metrics, measured values).
    """
    model = work.loaded.model
    pruned = _prune(work, pruner)
    work.memory.end("prune")
    before_tuning = _score_before_tuning(work, pruned)
    work.memory.end("score before tuning")

    trained = yield from _train_into(model, work, pruned, train_stage)
    pruned = _end_of_schedule(work, pruned, trained.trainable)
    merge = _merge_into(model, work, trained.trainable, pruned)
    work.memory.end("merge")

    before_mask: BeforeMask | None = None
    if trained.trainable.last_masks is not None:
        before_mask = BeforeMask(work.score(), work.eval_loss())
        mask_weights_into(model, trained.trainable.last_masks)
    scores = _score(work, before_mask)
    actual_sparsity = _validate(work, pruned, merge.violations)
    metrics = (
        score_metrics(scores, before_tuning)
        | pruning_metrics(work, pruned, scores, actual_sparsity)
        | training_metrics(work, trained, merge, before_mask)
    )
    work.memory.end("score")
    return metrics, measurements(work, trained.training, scores)


def _prune(work: Work, pruner: Pruner) -> Pruned:
    pruned = pruner.prune_into(work.run, work.loaded, work.examples.train, work.ledger)
    write_json(work.folder / "sparse_config.json", pruned.sparse_config(work.run))
    if pruned.calibration_tokens is not None:
        work.log(calibration_line(work.run.cell.method, work.loaded.dims, pruned.calibration_tokens))
    return pruned


def _score_before_tuning(work: Work, pruned: Pruned) -> Metrics:
    """Metrics of the pruned model, computed by whichever mode comes first."""
    run, ledger = work.run, work.ledger
    known = ledger.pruned_baseline(run.pruned_baseline_id)
    if known is None:
        scored = work.score()
        own = {"metrics": scored.metrics, "run_id": run.run_id, "environment": environment()}
        ledger.write_pruned_baseline(run.pruned_baseline_id, own, scored.outcomes)
        known = ledger.pruned_baseline(run.pruned_baseline_id)  # another worker may have been faster
        assert known is not None
    metrics: Metrics = known["metrics"]
    work.log(f"pruned to {pruned.masks.sparsity:.4f}, before tuning {_described(metrics)}")
    return metrics


def _described(metrics: Metrics) -> str:
    return f"{metrics['primary_metric']} {metrics[score_name(metrics)]:.4f}"


def _train_into(
    model: PreTrainedModel, work: Work, pruned: Pruned, train_stage: TrainStage
) -> Generator[Step | None, None, Trained]:
    """Set the pruned model up in the run's mode, train it in place, and save what was trained."""
    run, log = work.run, work.log
    masks = cerebras_backend.update_masks(run, pruned) if run.cerebras else pruned.masks
    protocol = replace(run.protocol, masked_lora_impl="effective-weight") if run.cerebras else run.protocol
    modules = {"modules": run.super_adapter.space.modules} if run.super_adapter else {}
    schedule = MaskSchedule.from_run(run)
    trainable = setup(run.cell.mode, model, protocol, masks, run.draw_seed, schedule=schedule, **modules)
    with trainable.shrunk():
        work.memory.end("set up")
        log(trainable.summary())
        step_flops = _step_flops(work, pruned, trainable.factor_weights)
        training = yield from train_stage(run, trainable, pruned, work.examples, work.budgets, work.ledger, log)
        work.memory.end("train")
    trainable.save(work.folder)
    return Trained(trainable, training, step_flops)


def _end_of_schedule(work: Work, pruned: Pruned, trainable: TrainableModel) -> Pruned:
    """Return the pruning that is scored: with the masks that the training ended with, which are kept, since nothing can
    make them again. Raises `RunError` where they have not the zeros of the target."""
    run = work.run
    if not run.updates:
        return pruned
    ended = packed(trainable.masks)
    MaskSchedule.from_run(run).check_reached(pruned.masks, ended, run.cell.sparsity)
    write_bits(work.folder / ENDED_MASKS, ended)
    final = pruned.trained_to(ended)
    write_json(work.folder / "sparse_config.json", final.sparse_config(run))
    return final


def _step_flops(work: Work, pruned: Pruned, factor_weights: int) -> int | None:
    """FLOPs of a step, their mean where masks change; unknown of a super-adapter, whose steps train slices of different
    sizes."""
    if work.run.super_adapter is not None:
        return None
    run, train, on_prompt = work.run, work.examples.train, work.run.protocol.train_on_prompt
    lengths = [(example_tokens(example), target_tokens(example, on_prompt)) for example in train]
    kept = None
    if run.updates:
        sparsity = mean_sparsity(pruned.masks.sparsity, run.updates, run.protocol.steps)
        kept = (1 - sparsity) * sum(map(prod, pruned.masks.shapes.values()))
    flops = training_flops(pruned.masks, work.loaded.dims, lengths, factor_weights, kept)
    return round(flops * run.protocol.global_batch_size / len(train))


def _merge_into(model: PreTrainedModel, work: Work, trainable: TrainableModel, pruned: Pruned) -> MergeReport:
    """Merge what was trained into `model`, in place. Where the merge is exact, the logits must stay to the last bit."""
    trained = _logits(trainable.model, work.probe) if trainable.is_merged_exactly else None
    merge = trainable.merge_into_model(pruned.weights)
    if trained is None or torch.equal(trained, _logits(model, work.probe)):
        return merge
    return replace(merge, violations=[*merge.violations, "the merged model must compute exactly the trained function"])


@torch.no_grad()
def _logits(model: Any, examples: list[Encoded]) -> Tensor:
    """Logits of every token of `examples`: (tokens, vocabulary). They differ if a weight computes differently."""
    texts = (torch.tensor([example.context + example.continuation], device=model.device) for example in examples)
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in texts])


def _score(work: Work, before_mask: BeforeMask | None) -> Scores:
    if before_mask is not None:
        write_outcomes(work.folder / "examples_before_merge.parquet", before_mask.scored.outcomes)
    started = time.perf_counter()
    with hashing(scored_weights(work.loaded.model, work.run.protocol)) as checksum:
        scored = work.score()
        seconds = time.perf_counter() - started
    write_outcomes(work.folder / "examples.parquet", scored.outcomes)
    work.log(_described(scored.metrics))
    return Scores(scored, before_mask, seconds, checksum())


def _validate(work: Work, pruned: Pruned, violations: list[str]) -> float:
    """Write the validation report of the scored model, and return its sparsity. Raises `RunError` for a fault."""
    weights = prunable_weights(work.loaded.model)
    report = validation_report(weights, pruned.masks, work.run.cell.sparsity, pruned.checksum, violations)
    write_json(work.folder / "validation_report.json", report)
    if not report["all_valid"]:
        raise RunError("a run must pass its validation: " + "; ".join(report["violations"]))
    return float(report["actual_sparsity"])
