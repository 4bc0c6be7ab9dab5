"""validate: a checkpoint checked against its mask."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command


def declare(commands: Any) -> None:
    validate = add_command(
        commands,
        "validate",
        _validate,
        "check a checkpoint against its mask; writes validation_report.json into the checkpoint",
        "example:\n    tune-sparse validate ./pruned --masks masks/my-llama/masks_sparsity50_wanda.safetensors",
    )
    validate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    validate.add_argument("--masks", type=Path, required=True, metavar="FILE")
    validate.add_argument("--sparsity", type=float, help="the asked one; which level of a packed map")
    validate.add_argument("--tolerance", type=float, default=1e-6, help="of a masked weight; default 1e-6")
    validate.add_argument("--json", action="store_true", help="print the report as JSON")


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
    write_json(chosen.checkpoint / "validation_report.json", report)
    if chosen.json:
        print(json.dumps(report))
    else:
        verdict = "valid" if report["all_valid"] else f"{len(report['violations'])} violations"
        print(f"{chosen.checkpoint}: {verdict}, sparsity {report['actual_sparsity']:.4f}")
        print("".join(f"  {text}\n" for text in report["violations"]), end="")
    return OK if report["all_valid"] else FAULT
