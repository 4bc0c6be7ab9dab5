"""Is a pruned and trained model what it claims to be?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tune_sparse.models.float_bits import BITS, from_bits, row_chunks
from tune_sparse.pruning.masks import Masks, mask_sha256, packed
from tune_sparse.pruning.methods import TOLERANCE


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """A checksum over names, shapes and bits, matrix by matrix in the order of their names.

    Equal weights have equal checksums: which zeros are negative depends on the way to them, so all count as +0.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = (weights[name].detach() + 0).cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def hashing(weights: Mapping[str, Tensor]) -> Iterator[Callable[[], str]]:
    """Compute `weights_sha256` while the block runs, beside a device that computes it, or else when it is asked for.

    weights: on one device; the block must not change them.
    """
    if any(weight.device.type == "cpu" for weight in weights.values()):
        yield lambda: weights_sha256(weights)
        return
    with ThreadPoolExecutor(1, "hash") as beside:
        yield beside.submit(weights_sha256, weights).result


def mask_violations(masks: Masks, sparsity: float) -> list[str]:
    """Broken rules of a set of masks: no layer empty, within `TOLERANCE` of the target sparsity."""
    bits = packed(masks)
    found = [f"{name}: no layer may be 100% sparse" for name, kept in bits.kept.items() if not kept]
    if abs(bits.sparsity - sparsity) > TOLERANCE:
        found.append(f"the masks' sparsity must be within {TOLERANCE:g} of {sparsity:g}, got {bits.sparsity:.4f}")
    return found


@dataclass(frozen=True)
class MatrixFacts:
    """The counts of one deployed matrix."""

    is_finite: bool
    max_abs_at_masked: float
    zeros: int
    weights: int


def count_facts(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, MatrixFacts]:
    """Look once at every weight that has a mask, matrix by matrix, and wait for the device once."""
    kinds, found = {}, []
    for name, weight in weights.items():
        if name in masks:
            kinds[name] = (weight.dtype, weight.numel())
            found.append(_magnitudes(weight, masks[name]))
    return {
        name: MatrixFacts(largest < BITS[dtype][2], from_bits(at_masked, dtype), zeros, size)
        for (name, (dtype, size)), (largest, at_masked, zeros) in zip(
            kinds.items(), torch.stack(found).tolist(), strict=True
        )
    }


def _magnitudes(weight: Tensor, mask: Tensor) -> Tensor:
    """The bits of the largest |w|, those of the largest |w| where masked, and the number of zeros: (3,), int64.

    The bits of magnitudes are ordered as the magnitudes are, NaN last, and stay what they are where a product with 0
    or 1 would make NaN of inf.
    """
    kind, magnitude, _ = BITS[weight.dtype]
    found = []
    for rows in row_chunks(weight):
        bits = weight[rows].contiguous().view(kind) & magnitude
        counts = bits.max(), (bits * (~mask[rows]).to(kind)).max(), (bits == 0).sum()
        found.append(torch.stack([count.long() for count in counts]))
    largest, at_masked, zeros = torch.stack(found).unbind(1)
    return torch.stack([largest.max(), at_masked.max(), zeros.sum()])


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
    violations, bits = [*violations, *mask_violations(masks, sparsity)], packed(masks)
    violations += [f"{name}: a matrix needs a mask, and a mask a matrix" for name in weights.keys() ^ bits.keys()]
    if bits.sha256 != trained_mask_sha256:
        violations.append(f"the mask must be the one that was trained, {trained_mask_sha256}, got {bits.sha256}")
    facts = count_facts(weights, bits)
    violations += [f"{name}: weights must be finite" for name, fact in facts.items() if not fact.is_finite]
    at_masked = {name: fact.max_abs_at_masked for name, fact in facts.items()}
    violations += [
        f"{name}: masked weights must be 0, got {value:g}"
        for name, value in at_masked.items()
        if not value <= tolerance
    ]
    actual = sum(fact.zeros for fact in facts.values()) / sum(fact.weights for fact in facts.values())
    if abs(actual - sparsity) > TOLERANCE:
        violations.append(f"the weights' sparsity must be within {TOLERANCE:g} of {sparsity:g}, got {actual:.4f}")
    return {
        "all_valid": not violations,
        "violations": violations,
        "max_abs_at_masked": max(filter(math.isfinite, at_masked.values()), default=None),
        "mask_sha256": bits.sha256,
        "actual_sparsity": actual,
        "zeros_by_matrix": {name: [fact.zeros, fact.weights] for name, fact in facts.items()},
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
