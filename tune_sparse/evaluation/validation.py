"""Is a pruned and trained model what it claims to be?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tune_sparse.pruning.masks import Masks, count_sparsity, mask_sha256
from tune_sparse.pruning.methods import TOLERANCE


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """A checksum over names, shapes and bits, matrix by matrix in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def mask_violations(masks: Masks, sparsity: float) -> list[str]:
    """Broken rules of a set of masks: binary, no layer empty, within `TOLERANCE` of the target sparsity."""
    found = [
        f"{name}: a mask must be bool, got {mask.dtype}" for name, mask in masks.items() if mask.dtype != torch.bool
    ]
    found += [f"{name}: no layer may be 100% sparse" for name, mask in masks.items() if not mask.any()]
    actual = count_sparsity(masks)
    if abs(actual - sparsity) > TOLERANCE:
        found.append(f"the masks' sparsity must be within {TOLERANCE:g} of {sparsity:g}, got {actual:.4f}")
    return found


def validation_report(
    weights: Mapping[str, Tensor],
    masks: Masks,
    sparsity: float,
    trained_mask_sha256: str,
    violations: Sequence[str] = (),
    tolerance: float = 0.0,
) -> dict[str, Any]:
    """Check deployed weights against their masks.

    Every masked position must be 0 (within `tolerance`, for checkpoints that come from elsewhere), the masks must
    be those that training used, and the zeros counted in the weights must be within `TOLERANCE` of the target
    sparsity. `violations` were found before and are reported too. Returns all_valid, violations, max_abs_at_masked,
    mask_sha256, actual_sparsity and, per matrix, the zeros and the number of weights.
    """
    violations = [*violations, *mask_violations(masks, sparsity)]
    violations += [f"{name}: a matrix needs a mask, and a mask a matrix" for name in weights.keys() ^ masks.keys()]
    weights = {name: weight for name, weight in weights.items() if name in masks}
    checksum = mask_sha256(masks)
    if checksum != trained_mask_sha256:
        violations.append(f"the mask must be the one that was trained, {trained_mask_sha256}, got {checksum}")
    violations += [f"{name}: weights must be finite" for name, w in weights.items() if not w.isfinite().all()]
    at_masked = {name: _largest(w[masks[name] == 0]) for name, w in weights.items()}
    violations += [
        f"{name}: masked weights must be 0, got {value:g}"
        for name, value in at_masked.items()
        if not value <= tolerance
    ]
    zeros = {name: [int((w == 0).sum()), w.numel()] for name, w in weights.items()}
    actual = sum(z for z, _ in zeros.values()) / sum(n for _, n in zeros.values())
    if abs(actual - sparsity) > TOLERANCE:
        violations.append(f"the weights' sparsity must be within {TOLERANCE:g} of {sparsity:g}, got {actual:.4f}")
    return {
        "all_valid": not violations,
        "violations": violations,
        "max_abs_at_masked": max(filter(math.isfinite, at_masked.values()), default=None),
        "mask_sha256": checksum,
        "actual_sparsity": actual,
        "zeros_by_matrix": zeros,
    }


def checkpoint_report(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    expected: Sequence[str],
    sparsity: float | None = None,
    known_sha256: str | None = None,
    tolerance: float = 1e-6,
) -> dict[str, Any]:
    """As `validation_report`, for files: one matrix in memory at a time, every violation with its first position.

    expected: the matrices that must have a mask. sparsity: the target, where it is known. known_sha256: the
    checksum that the masks should have, where it is known. The actual sparsity is that of the masks.
    """
    violations = [f"{name}: a matrix needs a mask" for name in expected if name not in masks]
    by_matrix: dict[str, dict[str, Any]] = {}
    for name in sorted(masks):
        found, counts = _matrix_violations(weights[name], masks[name], tolerance)
        violations += [f"{name}{text}" for text in found]
        by_matrix[name] = counts
    checksum = mask_sha256(masks)
    if known_sha256 is not None and checksum != known_sha256:
        violations.append(f"the masks must be the ones that were made, {known_sha256}, got {checksum}")
    total = sum(counts["weights"] for counts in by_matrix.values())
    actual = 1 - sum(counts["kept"] for counts in by_matrix.values()) / total
    if sparsity is not None and abs(actual - sparsity) > TOLERANCE:
        violations.append(f"the masks' sparsity must be within {TOLERANCE:g} of {sparsity:g}, got {actual:.4f}")
    return {
        "all_valid": not violations,
        "violations": violations,
        "max_abs_at_masked": max((counts["max_abs_at_masked"] for counts in by_matrix.values()), default=None),
        "mask_sha256": checksum,
        "actual_sparsity": actual,
        "by_matrix": by_matrix,
    }


def _matrix_violations(weight: Tensor, mask: Tensor, tolerance: float) -> tuple[list[str], dict[str, Any]]:
    violations = []
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        violations.append(": a mask must be binary, it has values besides 0 and 1")
    keep = mask != 0
    kept = int(keep.sum())
    if not kept:
        violations.append(": no layer may be 100% sparse")
    beyond = (weight.abs() * ~keep).float()
    filled = beyond > tolerance
    if filled.any():
        first = filled.nonzero()[0].tolist()
        count = int(filled.sum())
        violations.append(
            f"{first}: masked weights must be 0 within {tolerance:g}, got {float(weight[tuple(first)]):g}"
            + (f", and {count - 1} more" if count > 1 else "")
        )
    zeros = int((weight == 0).sum())
    counts = {"weights": mask.numel(), "kept": kept, "zeros": zeros, "max_abs_at_masked": float(beyond.max())}
    return violations, counts


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
