"""The numbers of a finished run, as its record has them."""

from __future__ import annotations

from math import prod
from typing import Any

from trainables.hardware import gpu_memory_bytes
from trainables.mode import MergeReport
from trainables.pruning_stage import Pruned
from trainables.training import Training
from trainables.work import BeforeMask, Scores, Trained, Work
from tune_sparse.evaluation.flops import SEQUENCE_LENGTHS, inference_flops
from tune_sparse.evaluation.metrics import Metrics, combined, metrics_by_task, with_earlier
from tune_sparse.ledger.run import Run


def score_metrics(scores: Scores, before_tuning: Metrics) -> dict[str, Any]:
    """The metrics of a cell by its scores: after training, before it, and before the last mask."""
    before_merge = scores.before_mask.scored.by_task if scores.before_mask else {}
    return combined(
        {
            task: with_earlier(metrics, metrics_by_task(before_tuning, task)[task], before_merge.get(task))
            for task, metrics in scores.scored.by_task.items()
        }
    )


def pruning_metrics(work: Work, pruned: Pruned, scores: Scores, actual_sparsity: float) -> dict[str, Any]:
    """What was pruned and what was scored, counted and summed up."""
    shape = work.loaded.dims
    return (
        {
            "actual_sparsity": actual_sparsity,
            "mask_sha256": pruned.checksum,
            "weights_sha256": scores.weights_sha256,
            "inference_flops": {
                str(tokens): inference_flops(pruned.masks, shape, tokens) for tokens in SEQUENCE_LENGTHS
            },
        }
        | pruned.calibration_metrics(work.run, shape)
        | _level_metrics(work.run, pruned)
    )


def _level_metrics(run: Run, pruned: Pruned) -> dict[str, Any]:
    """What a level of a chain was before its tuning; `_validate` found the same zeros after it."""
    if not run.is_level:
        return {}
    weights = sum(map(prod, pruned.masks.shapes.values()))
    return {
        "sparsity_before_tuning": (weights - sum(pruned.masks.kept.values())) / weights,
        "level_steps": run.own_steps,
        "chain_steps_so_far": run.protocol.steps,
    }


def training_metrics(
    work: Work, trained: Trained, merge: MergeReport, before_mask: BeforeMask | None
) -> dict[str, Any]:
    """Losses and costs of the training."""
    return {
        "train_loss": trained.training.last_loss,
        "eval_loss": work.eval_loss(),
        "eval_loss_before_mask": before_mask.eval_loss if before_mask else None,
        "epochs": trained.training.examples / len(work.examples.train),
        "update_rounded_away_fraction": merge.rounded_away_fraction,
        "train_step_flops": trained.step_flops,
        **({"dynamics": trained.training.summary} if trained.training.summary else {}),
    } | merge.metrics


def measurements(work: Work, training: Training, scores: Scores) -> dict[str, Any]:
    """Seconds, rates and memory, which do not repeat."""
    return {
        "trial_seconds": work.log.seconds(),
        "train_seconds": training.seconds,
        **training.rates(),
        "seconds_to_best_eval_loss": training.seconds_to_best_eval_loss,
        "inference_examples_per_second": len(scores.scored.outcomes) / scores.seconds,
        **({"compile_seconds": None} | training.appliance),
        "peak_memory_bytes": work.memory.by_stage.get("train"),
        "cell_peak_memory_bytes": work.memory.bytes,
        "cell_peak_reserved_bytes": work.memory.reserved_bytes,
        "peak_memory_bytes_by_stage": work.memory.by_stage,
        "gpu_memory_bytes": gpu_memory_bytes(),
        "attention_implementation": work.loaded.model.config._attn_implementation,
        "budgets": (training.budgets or work.budgets).as_record(),
    }
