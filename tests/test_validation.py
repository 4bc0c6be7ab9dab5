from __future__ import annotations

import math
import threading
from functools import partial

import pytest
import torch
from plain_masks import masked
from torch import Tensor

from tune_sparse.evaluation import validation
from tune_sparse.evaluation.validation import hashing, mask_violations, validation_report, weights_sha256
from tune_sparse.models.float_bits import row_chunks
from tune_sparse.pruning.masks import Masks, keep_highest, mask_sha256


@pytest.fixture
def masks() -> Masks:
    return {name: keep_highest(scores(seed), 50) for seed, name in enumerate("ab")}


@pytest.fixture
def weights(masks: Masks) -> dict[str, Tensor]:
    return masked({name: scores(seed) + 1 for seed, name in enumerate("ab")}, masks)


def scores(seed: int) -> Tensor:
    return torch.rand(10, 10, generator=torch.Generator().manual_seed(seed))


def test_a_clean_model_passes(weights: dict[str, Tensor], masks: Masks) -> None:
    report = validation_report(weights, masks, 0.5, mask_sha256(masks))
    assert report == {
        "all_valid": True,
        "violations": [],
        "max_abs_at_masked": 0.0,
        "mask_sha256": mask_sha256(masks),
        "actual_sparsity": 0.5,
        "zeros_by_matrix": {"a": [50, 100], "b": [50, 100]},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_of_weights_tells_every_bit_name_and_shape(weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    known = weights_sha256(weights)
    assert weights_sha256(dict(reversed(weights.items()))) == known
    changed = {name: weight.clone() for name, weight in weights.items()}
    changed["b"].view(torch.uint8)[3, 3] ^= 1
    renamed = {"a": weights["a"], "c": weights["b"]}
    reshaped = {name: weight.view(5, 20) for name, weight in weights.items()}
    assert len({known, *(weights_sha256(other) for other in (changed, renamed, reshaped))}) == 4


def masked_position(mask: Tensor) -> tuple[int, ...]:
    return tuple((~mask).nonzero()[0].tolist())


@pytest.mark.parametrize("value", [0.25, -0.25, math.inf])
def test_a_filled_zero_is_found(value: float, weights: dict[str, Tensor], masks: Masks) -> None:
    weights["b"][masked_position(masks["b"])] = value
    report = validation_report(weights, masks, 0.5, mask_sha256(masks))
    assert not report["all_valid"]
    assert f"b: masked weights must be 0, got {abs(value):g}" in report["violations"]
    assert report["zeros_by_matrix"]["b"] == [49, 100]


def test_a_filled_zero_counts_in_the_largest_value_found(weights: dict[str, Tensor], masks: Masks) -> None:
    weights["a"][masked_position(masks["a"])] = -0.5
    weights["b"][masked_position(masks["b"])] = 0.25
    assert validation_report(weights, masks, 0.5, mask_sha256(masks))["max_abs_at_masked"] == 0.5


def test_the_tolerance_is_for_what_fills_the_zeros(weights: dict[str, Tensor], masks: Masks) -> None:
    weights["b"][masked_position(masks["b"])] = 1e-7
    checksum = mask_sha256(masks)
    assert validation_report(weights, masks, 0.5, checksum, tolerance=1e-6)["all_valid"]
    assert not validation_report(weights, masks, 0.5, checksum)["all_valid"]


def test_another_mask_than_the_trained_one_is_found(weights: dict[str, Tensor], masks: Masks) -> None:
    report = validation_report(weights, masks, 0.5, "0123")
    assert report["violations"] == [f"the mask must be the one that was trained, 0123, got {mask_sha256(masks)}"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kept_weight_that_is_not_finite_is_found(value: float, weights: dict[str, Tensor], masks: Masks) -> None:
    weights["a"][tuple(masks["a"].nonzero()[0])] = value
    report = validation_report(weights, masks, 0.5, mask_sha256(masks))
    assert report["violations"] == ["a: weights must be finite"]


def test_a_nan_at_a_masked_position_is_found_twice(weights: dict[str, Tensor], masks: Masks) -> None:
    weights["a"][masked_position(masks["a"])] = math.nan
    report = validation_report(weights, masks, 0.5, mask_sha256(masks))
    assert report["violations"] == ["a: weights must be finite", "a: masked weights must be 0, got nan"]


def test_weights_with_more_zeros_than_masked_are_found(weights: dict[str, Tensor], masks: Masks) -> None:
    weights["a"][:3] = 0
    zeros = 50 + int((weights["a"] == 0).sum())
    report = validation_report(weights, masks, 0.5, mask_sha256(masks))
    assert report["violations"] == [f"the weights' sparsity must be within 0.01 of 0.5, got {zeros / 200:.4f}"]


@pytest.mark.parametrize(("sparsity", "valid"), [(0.491, True), (0.509, True), (0.489, False), (0.511, False)])
def test_sparsity_is_within_one_percent_of_the_asked(sparsity: float, valid: bool, masks: Masks) -> None:
    expected = [] if valid else [f"the masks' sparsity must be within 0.01 of {sparsity:g}, got 0.5000"]
    assert mask_violations(masks, sparsity) == expected


def test_an_empty_layer_is_found(masks: Masks) -> None:
    empty = masks | {"a": torch.zeros(10, 10, dtype=torch.bool)}
    assert mask_violations(empty, 0.75) == ["a: no layer may be 100% sparse"]


def plain_report(weights: dict[str, Tensor], masks: Masks) -> tuple[float, dict[str, list[int]], list[str]]:
    """(largest at masked, zeros and weights, those not finite), written down by boolean indexing."""
    at_masked = {name: weight[~masks[name]].abs().max() for name, weight in weights.items()}
    largest = max(float(value) for value in at_masked.values() if value.isfinite())
    zeros = {name: [int((weight == 0).sum()), weight.numel()] for name, weight in weights.items()}
    return largest, zeros, [name for name, weight in weights.items() if not weight.isfinite().all()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [7, 30, 1 << 18])
def test_the_report_is_that_of_boolean_indexing(
    dtype: torch.dtype, chunk: int, weights: dict[str, Tensor], masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "row_chunks", partial(row_chunks, chunk=chunk))
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    weights["a"][masked_position(masks["a"])] = -0.3
    weights["a"][tuple(masks["a"].nonzero()[0])] = -math.inf
    weights["b"][tuple(masks["b"].nonzero()[-1])] = -0.0
    report = validation_report(weights, masks, 0.5, mask_sha256(masks))
    largest, zeros, infinite = plain_report(weights, masks)
    assert (report["max_abs_at_masked"], report["zeros_by_matrix"]) == (largest, zeros)
    assert [f"{name}: weights must be finite" for name in infinite] == report["violations"][:1]


def test_weights_are_hashed_while_the_block_runs_where_another_device_computes_it(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(weights: dict[str, Tensor]) -> str:
        threads.append(threading.current_thread().name)
        return weights_sha256(weights)

    expected = weights_sha256(weights)
    with hashing(weights) as checksum:
        pass
    assert checksum() == expected
    monkeypatch.setattr(validation, "weights_sha256", noted)
    elsewhere = {name: weight.to("meta") for name, weight in weights.items()}
    with pytest.raises(NotImplementedError), hashing(elsewhere) as checksum:
        checksum()
    assert [name.split("_")[0] for name in threads] == ["hash"]


def test_equal_weights_have_one_checksum_whatever_the_sign_of_a_zero() -> None:
    weight = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    assert weights_sha256({"w": weight * 0}) == weights_sha256({"w": weight * -0.0})
    assert weights_sha256({"w": weight}) != weights_sha256({"w": weight.abs()})
