"""Full-weight training under a mask: weights and both moments are 0 there after every step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from factories import TINY_PROTOCOL, finished, tiny_run
from plain_masks import make_masks, masked
from torch import Tensor
from torch.optim import Optimizer

from trainables import masked_finetuning
from trainables.finetuning import setup
from trainables.masked_finetuning import MaskedFinetuning
from trainables.worker import WorkerCache
from tune_sparse.config import Protocol, SweepConfig
from tune_sparse.data.splits import Encoded
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.architectures import adapter_weights, pruned_weights
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.pruning.masks import Masks
from tune_sparse.sweep.plan import make_plan
from tune_sparse.training.loop import Step, accelerator_for, fit

EXAMPLES = [Encoded(tuple(range(i, i + 10)), (i, i + 1)) for i in range(8)]


def pruned_and_set_up(
    llama: Path, protocol: Protocol, method: str = "unstructured"
) -> tuple[MaskedFinetuning, dict[str, Tensor]]:
    """(the model in training, pruned weights)."""
    model = load_model(llama, getattr(torch, protocol.precision), torch.device("cpu"))
    weights = prunable_weights(model)
    masks: Masks = make_masks(method, weights, check_checkpoint(str(llama)).dims, 0.5, seed=0)
    pruned = masked(weights, masks)
    write_weights_into(model, pruned)
    return masked_finetuning.setup("masked-finetuning", model, protocol, masks), pruned


def steps_of(trained: MaskedFinetuning, optimizer: Optimizer, protocol: Protocol) -> Iterator[Step]:
    accelerator = accelerator_for(trained.mixed_precision)
    return fit(trained.model, optimizer, EXAMPLES, protocol, 0, 0, accelerator, trained.hooks(optimizer))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["unstructured", "structured"])
def test_after_every_step_the_zeros_are_zero_and_kept_weights_move(method: str, precision: str, llama: Path) -> None:
    protocol = Protocol(**vars(TINY_PROTOCOL) | {"precision": precision})
    trained, pruned = pruned_and_set_up(llama, protocol, method)
    optimizer = trained.optimizer(protocol)
    for _ in steps_of(trained, optimizer, protocol):
        for weight, mask in zip(trained.parameters(), trained.masks.values(), strict=True):
            assert weight.dtype == torch.float32
            assert not weight[~mask].any()
            assert not any(optimizer.state[weight][moment][~mask].any() for moment in ("exp_avg", "exp_avg_sq"))
    assert trained.merge_into_model(pruned).violations == []
    merged = prunable_weights(trained.model)
    for name, weight in pruned.items():
        assert merged[name].dtype == getattr(torch, precision)
        assert not merged[name][~trained.masks[name]].any()
        assert not torch.equal(merged[name], weight)


def test_nothing_but_the_pruned_layers_is_trained(llama: Path) -> None:
    trained, _ = pruned_and_set_up(llama, TINY_PROTOCOL)
    before = {name: parameter.clone() for name, parameter in trained.model.named_parameters()}
    list(steps_of(trained, trained.optimizer(TINY_PROTOCOL), TINY_PROTOCOL))
    moved = {name for name, parameter in trained.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(trained.masks)


def test_a_filled_zero_is_found(llama: Path) -> None:
    trained, pruned = pruned_and_set_up(llama, TINY_PROTOCOL)
    name, mask = next(iter(trained.masks.items()))
    trained.parameters()[0].data[~mask] = 1.0
    assert trained.merge_into_model(pruned).violations == [f"{name}: masked weights must stay 0 in training"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_model_is_given_back_as_it_was(precision: str, llama: Path) -> None:
    protocol = Protocol(**vars(TINY_PROTOCOL) | {"precision": precision})
    trained, _ = pruned_and_set_up(llama, protocol)
    model = trained.unwrap()
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, precision)}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_worker_serves_lora_after_masked_finetuning(precision: str, llama: Path, tmp_path: Path) -> None:
    worker, lora = WorkerCache(), tiny_run(llama, precision=precision)
    weights = finished(tiny_run(llama, mode="masked-finetuning", precision=precision), Ledger(tmp_path), worker)
    assert (weights.status, weights.error) == ("done", None)
    alone = finished(lora, Ledger(tmp_path / "alone"), WorkerCache())
    assert finished(lora, Ledger(tmp_path), worker).metrics == alone.metrics
    assert worker.loads == 1
    assert weights.metrics["accuracy_before_tuning"] == alone.metrics["accuracy_before_tuning"]
    assert (weights.metrics["update_rounded_away_fraction"] < 1e-9) == (precision == "float32")


def test_without_zeros_it_is_a_training_of_its_own_that_all_methods_share(llama: Path, tmp_path: Path) -> None:
    modes = ("sparse-to-sparse", "masked-finetuning")
    names = {
        "models": (str(llama),),
        "tasks": ("boolq",),
        "modes": modes,
        "sparsities": (0.0,),
        "data_dir": "synthetic",
    }
    plan = make_plan(SweepConfig.from_names(names | {"results_dir": tmp_path}))
    assert [run.cell.mode for run in plan.runs.values()] == ["dense", "masked-finetuning"]
    lora, weights = plan.runs.values()
    dims = plan.checkpoints[lora.cell.model].dims
    more = plan.estimate_bytes(weights) - plan.estimate_bytes(lora)
    assert more == 2 * pruned_weights(dims) - 4 * adapter_weights(dims, 16)


def test_it_is_set_up_by_its_name(llama: Path) -> None:
    model = load_model(llama, torch.float32, torch.device("cpu"))
    masks: Masks = {name: weight != 0 for name, weight in prunable_weights(model).items()}
    assert isinstance(setup("masked-finetuning", model, TINY_PROTOCOL, masks, 0), MaskedFinetuning)
