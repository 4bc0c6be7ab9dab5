"""The modes, each trained for a few steps for real: what they train, and what they merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import TINY_PROTOCOL
from plain_masks import make_masks, masked
from torch import Tensor

from trainables.finetuning import setup
from trainables.mode import MergeReport
from trainables.pipeline import TRAIN_STAGES
from tune_sparse.config import BACKENDS
from tune_sparse.data.splits import Encoded
from tune_sparse.lora.layer import sparse_lora_layers
from tune_sparse.lora.merging import mask_weights_into
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.modes import MODES
from tune_sparse.pruning.masks import Masks
from tune_sparse.training.loop import accelerator_for, fit

IDS = torch.arange(2 * 20).view(2, 20)
EXAMPLES = [Encoded(tuple(range(i, i + 10)), (i, i + 1)) for i in range(8)]


@dataclass(frozen=True)
class Trained:
    masks: Masks
    pruned: dict[str, Tensor]
    trainable: Any

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: torch.cat([f.flatten() for f in layer.factors()[:2]]) for name, layer in self.layers()}

    def layers(self) -> Iterator[tuple[str, Any]]:
        return sparse_lora_layers(self.trainable.adapted)

    def merge(self) -> tuple[MergeReport, dict[str, Tensor]]:
        """What the merge found, and the weights that it made."""
        model = self.trainable.model
        report = self.trainable.merge_into_model(self.pruned)
        return report, {name: weight.clone() for name, weight in prunable_weights(model).items()}


Train = Callable[..., Trained]


@pytest.fixture
def train(llama: Path) -> Train:
    """Prune a model, train it in a mode, merge it."""

    def run(mode: str, method: str = "unstructured", sparsity: float = 0.5, **changes: Any) -> Trained:
        protocol = replace(TINY_PROTOCOL, **changes)
        model = load_model(llama, getattr(torch, protocol.precision), torch.device("cpu"))
        weights = prunable_weights(model)
        masks = make_masks(method, weights, check_checkpoint(str(llama)).dims, sparsity, seed=0)
        pruned = masked(weights, masks)
        write_weights_into(model, pruned)
        trainable = setup(mode, model, protocol, masks, 0)
        accelerator = accelerator_for(trainable.mixed_precision)
        optimizer = trainable.optimizer(protocol)
        hooks = trainable.hooks(optimizer)
        list(fit(trainable.model, optimizer, EXAMPLES, protocol, 0, accelerator=accelerator, hooks=hooks))
        return Trained(masks, pruned, trainable)

    return run


def test_every_backend_of_the_configuration_has_its_train_stage() -> None:
    assert tuple(TRAIN_STAGES) == BACKENDS


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_the_merged_model_computes_the_trained_function_to_the_last_bit_or_but_for_rounding(
    mode: str, precision: str, train: Train
) -> None:
    trained = train(mode, precision=precision, max_grad_norm=100.0)
    model, is_exact = trained.trainable.model, trained.trainable.is_merged_exactly
    with torch.no_grad(), accelerator_for(trained.trainable.mixed_precision).autocast():
        expected = model(IDS).logits
    assert is_exact == (mode == "sparse-to-sparse" or (mode, precision) == ("masked-finetuning", "float32"))
    report, _ = trained.merge()
    assert report.violations == []
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, precision)}
    assert not any(parameter.requires_grad for parameter in prunable_weights(model).values())
    with torch.no_grad():
        merged = model(IDS).logits
    assert torch.equal(merged, expected) or not is_exact
    assert (merged - expected).norm() <= math.sqrt(torch.finfo(merged.dtype).eps) * expected.norm()


def plain_fraction(wanted: dict[str, Tensor], obtained: dict[str, Tensor]) -> float:
    """|wanted - obtained|² / |wanted|², written down whole."""
    lost = sum(float((wanted[name] - obtained[name]).double().square().sum()) for name in wanted)
    return lost / sum(float(update.double().square().sum()) for update in wanted.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_the_statistics_of_the_update_are_those_of_all_matrices_at_once(
    mode: str, precision: str, train: Train
) -> None:
    trained = train(mode, "random", precision=precision)
    if mode == "masked-finetuning":
        weights = prunable_weights(trained.trainable.model)
        update = {name: weight.clone() - trained.pruned[name].float() for name, weight in weights.items()}
    else:
        update = {name: layer.get_delta_weight("default").detach() for name, layer in trained.layers()}
    report, merged = trained.merge()
    arrived = {name: merged[name].float() - trained.pruned[name].float() for name in merged}
    assert report.rounded_away_fraction == plain_fraction(update, arrived)
    removed = {"update_removed_fraction": plain_fraction(update, masked(update, trained.masks))}
    assert report.metrics == (removed if mode == "sparse-to-dense" else {})


def test_a_frozen_weight_that_training_changed_is_found(train: Train) -> None:
    trained = train("sparse-to-dense")
    name, layer = next(trained.layers())
    layer.base_layer.weight.data[-1, -1] += 1e-3
    report, _ = trained.merge()
    assert report.violations == [f"{name}: the frozen weight must not change in training"]


def test_dense_merges_what_it_trained_without_a_zero(train: Train) -> None:
    trained = train("dense", sparsity=0.0)
    assert trained.trainable.last_masks is None
    assert all(layer.keep_mask is None for _, layer in trained.layers())
    assert all(weight.all() for weight in trained.merge()[1].values())


@pytest.mark.parametrize("method", ["unstructured", "structured", "random"])
def test_sparse_to_sparse_merges_zeros_exactly_at_the_mask(method: str, train: Train) -> None:
    trained = train("sparse-to-sparse", method)
    assert trained.trainable.last_masks is None
    for name, weight in trained.merge()[1].items():
        assert torch.equal(weight == 0, ~trained.masks[name])
        assert not torch.equal(weight, trained.pruned[name])


@pytest.mark.parametrize("method", ["unstructured", "structured", "random"])
def test_sparse_to_dense_fills_the_zeros_and_merges_them_masked(method: str, train: Train) -> None:
    trained = train("sparse-to-dense", method)
    model, last_masks = trained.trainable.model, trained.trainable.last_masks
    report, filled = trained.merge()
    assert any(filled[name][~mask].any() for name, mask in trained.masks.items())
    mask_weights_into(model, last_masks)
    assert all(torch.equal(prunable_weights(model)[name], filled[name] * mask) for name, mask in trained.masks.items())
    assert 0 < report.metrics["update_removed_fraction"] < 1


def test_the_removed_fraction_is_that_of_the_squared_update(train: Train) -> None:
    trained = train("sparse-to-dense", "random")
    removed = total = 0.0
    for name, layer in trained.layers():
        A, B, scaling = layer.factors()
        update = (scaling * B @ A).detach().double().square()
        removed += float(update[~trained.masks[name]].sum())
        total += float(update.sum())
    assert trained.merge()[0].metrics["update_removed_fraction"] == pytest.approx(removed / total, rel=1e-5)


def test_the_modes_train_different_adapters_on_an_elementwise_mask(train: Train) -> None:
    to_dense, to_sparse = train("sparse-to-dense").factors, train("sparse-to-sparse").factors
    again = train("sparse-to-sparse").factors
    for name in to_sparse:
        assert torch.equal(again[name], to_sparse[name])
        assert not torch.allclose(to_dense[name], to_sparse[name], rtol=1e-3, atol=1e-4)


def test_at_sparsity_0_every_mode_is_the_dense_baseline(train: Train) -> None:
    _, baseline = train("dense", sparsity=0.0).merge()
    for mode in ("sparse-to-dense", "sparse-to-sparse"):
        _, merged = train(mode, sparsity=0.0).merge()
        assert all(torch.equal(merged[name], weight) for name, weight in baseline.items())
