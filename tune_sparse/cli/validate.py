"""validate: a checkpoint checked against its mask."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_json
from tune_sparse.cli.words import paragraph, words


def declare(commands: Any) -> None:
    validate = add_command(
        commands,
        "validate",
        _validate,
        "check a pruned checkpoint against its masks, and write validation_report.json into its folder",
        examples=("validate ./pruned --masks masks/my-llama/masks_sparsity50_wanda.safetensors",),
        ok="the checkpoint is valid",
        fault="the checkpoint breaks a rule",
        notes=[
            words("sparsity", "mask"),
            paragraph(
                "A checkpoint is valid if all pruned weights are zero, every linear layer but the embeddings and the "
                "output layer has a mask, each mask keeps some weights, and the sparsity of all masks together is "
                "within 0.01 of the expected one. A weight that is not finite (NaN or infinite) makes the checkpoint a "
                "wrong file: exit status 2."
            ),
        ],
    )
    validate.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="folder of the checkpoint, in Hugging Face format, or a .mdl of Cerebras",
    )
    validate.add_argument(
        "--masks",
        type=Path,
        required=True,
        metavar="FILE",
        help="masks that `tune-sparse prune` wrote, in any of its formats",
    )
    validate.add_argument(
        "--sparsity",
        type=float,
        metavar="FRACTION",
        help="expected sparsity; it must be given for a file with the masks of several sparsities (`tune-sparse prune "
        "--format levels`), and chooses one (default: the sparsity in the file stats_*.json beside the masks; without "
        "that file it is not checked)",
    )
    validate.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        metavar="NUMBER",
        help="largest absolute value of a pruned weight that counts as zero (default: 1e-6)",
    )
    add_json(validate, "the report")


def _validate(chosen: argparse.Namespace) -> int:
    from tune_sparse.evaluation.validation import checkpoint_report
    from tune_sparse.files import write_json
    from tune_sparse.pruning.mask_io import MaskFile, check_same_model, recorded_statistics
    from tune_sparse.pruning.streaming import open_checkpoint

    checkpoint = open_checkpoint(str(chosen.checkpoint))
    masks = MaskFile(chosen.masks, chosen.sparsity)
    check_same_model(masks, checkpoint.tensors, chosen.masks)
    recorded = recorded_statistics(chosen.masks)
    report = checkpoint_report(
        checkpoint.tensors,
        masks,
        [matrix.name for matrix in checkpoint.prunable.matrices],
        recorded.get("sparsity") if chosen.sparsity is None else chosen.sparsity,
        recorded.get("mask_sha256"),
        chosen.tolerance,
    )
    folder = chosen.checkpoint if chosen.checkpoint.is_dir() else chosen.checkpoint.parent
    write_json(folder / "validation_report.json", report)
    if chosen.json:
        print(json.dumps(report))
    else:
        verdict = "valid" if report["all_valid"] else f"{len(report['violations'])} violations"
        print(f"{chosen.checkpoint}: {verdict}, sparsity {report['actual_sparsity']:.4f}")
        print("".join(f"  {text}\n" for text in report["violations"]), end="")
    return OK if report["all_valid"] else FAULT
