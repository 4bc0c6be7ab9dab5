"""Weights trained beside the pruned matrices or their adapters: found, stepped in float32, kept, restored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import TINY_PROTOCOL, finished, make_run, tiny_run
from torch import nn

from trainables.also_trained import AlsoTrained, scored_weights
from trainables.finetuning import setup
from trainables.rebuild import deployed_by
from trainables.worker import WorkerCache
from tune_sparse.config import Protocol, SweepConfig
from tune_sparse.config.protocol import OTHER_WEIGHTS
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.evaluation.validation import weights_sha256
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.models.architectures import TRAINED
from tune_sparse.models.checkpoints import load_model, prunable_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.other_weights import all_weights, count_other_weights, other_parameters
from tune_sparse.modes import MODES
from tune_sparse.training.loop import accelerator_for, fit

EXAMPLES = [Encoded(tuple(range(i, i + 10)), (i, i + 1)) for i in range(8)]
ALL = tuple(OTHER_WEIGHTS)


@pytest.mark.parametrize("name", TRAINED)
def test_every_weight_is_pruned_or_of_another_kind(name: str, architecture_folders: dict[str, Path]) -> None:
    model = load_model(architecture_folders[name], torch.float32, torch.device("cpu"))
    dims, others = ModelDims.from_config(model.config), other_parameters(model, ALL)
    assert {*others, *prunable_weights(model)} == {name for name, _ in model.named_parameters()}
    assert all_weights(dims) == sum(parameter.numel() for parameter in model.parameters())
    for kind in ALL:
        found = other_parameters(model, [kind])
        assert count_other_weights(dims, (kind,)) == sum(parameter.numel() for parameter in found.values()), kind
    assert not any(name.endswith("bias") for name in other_parameters(model, ["embeddings", "head"]))


def test_a_tied_head_is_one_tensor_with_the_embeddings(architecture_folders: dict[str, Path]) -> None:
    model = load_model(architecture_folders["GPT2LMHeadModel"], torch.float32, torch.device("cpu"))
    assert list(other_parameters(model, ["head"])) == ["transformer.wte.weight"]
    assert list(other_parameters(model, ["embeddings"])) == ["transformer.wte.weight", "transformer.wpe.weight"]
    dims = ModelDims.from_config(model.config)
    assert count_other_weights(dims, ("head", "embeddings")) == count_other_weights(dims, ("embeddings",))


def test_gradients_of_micro_batches_are_added_in_float32_and_steps_reach_the_model() -> None:
    """0.25 is an eighth of the distance of two bfloat16 numbers at 256: four of them move a copy, not the weight."""
    own = nn.Parameter(torch.tensor([[256.0]], dtype=torch.bfloat16), requires_grad=False)
    also = AlsoTrained.begin({"w": own})
    for _ in range(2):
        (own * 0.5).sum().backward()
    [copy] = also.parameters()
    assert own.grad is None
    assert copy.grad is not None
    assert copy.grad.item() == 1.0
    optimizer = torch.optim.SGD(also.parameters(), lr=0.25)
    optimizer.register_step_post_hook(also._copy_into_model)
    optimizer.step()
    assert (copy.item(), own.item()) == (255.75, 256.0)
    for _ in range(3):
        optimizer.step()
    assert (copy.item(), own.item()) == (255.0, 255.0)
    also.end()
    assert not own.requires_grad


def test_biases_and_norms_have_no_weight_decay() -> None:
    own = {"norm": nn.Parameter(torch.ones(2)), "matrix": nn.Parameter(torch.ones(2, 2))}
    optimizer = AlsoTrained.begin(own).optimizer([torch.ones(3)], Protocol(weight_decay=0.1))
    decays = [(group["weight_decay"], [tuple(t.shape) for t in group["params"]]) for group in optimizer.param_groups]
    assert decays == [(0.1, [(3,), (2, 2)]), (0.0, [(2,)])]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", pytest.param("OPTForCausalLM", marks=pytest.mark.slow)]
)
def test_what_is_named_is_trained_and_nothing_else(
    name: str, mode: str, precision: str, architecture_folders: dict[str, Path]
) -> None:
    protocol = replace(TINY_PROTOCOL, precision=precision, train_also=("bias", "norm"), steps=2)
    model = load_model(architecture_folders[name], getattr(torch, precision), torch.device("cpu"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    pruned = {name: weight.clone() for name, weight in prunable_weights(model).items()}
    named = set(other_parameters(model, protocol.train_also))
    masks = {name: weight != 0 for name, weight in pruned.items()}
    trainable = setup(mode, model, protocol, masks, 0)
    accelerator = accelerator_for(trainable.mixed_precision)
    list(fit(trainable.model, trainable.optimizer(protocol), EXAMPLES, protocol, 0, accelerator=accelerator))
    assert trainable.merge_into_model(pruned).violations == []
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, precision)}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert moved - set(pruned) <= named
    if precision == "float32":
        assert moved - set(pruned) >= {name for name in named if "k_proj.bias" not in name}  # keys' biases cancel


@pytest.mark.parametrize("mode", ["sparse-to-dense", pytest.param("masked-finetuning", marks=pytest.mark.slow)])
def test_a_run_is_restored_with_them_and_the_next_one_begins_without(mode: str, llama: Path, tmp_path: Path) -> None:
    ledger, worker, run = (
        Ledger(tmp_path),
        WorkerCache(),
        tiny_run(llama, mode=mode, precision="bfloat16", train_also=ALL),
    )
    record = finished(run, ledger, worker)
    assert (record.status, record.error) == ("done", None)
    loaded, _ = deployed_by(run, ledger, WorkerCache())
    scored = scored_weights(loaded.model, run.protocol)
    assert weights_sha256(scored) == record.metrics["weights_sha256"]
    assert len(scored) > len(prunable_weights(loaded.model))
    plain = tiny_run(llama, precision="bfloat16")
    assert finished(plain, ledger, worker).metrics == finished(plain, Ledger(tmp_path / "alone")).metrics
    assert worker.loads == 1


def test_they_are_part_of_an_identity_in_any_order_and_only_where_set() -> None:
    def identity(*kinds: str) -> str:
        return make_run(protocol=Protocol(train_also=kinds)).identity

    assert identity("norm", "bias") == identity("bias", "norm")
    assert len({identity(), identity("norm"), identity("norm", "bias")}) == 3
    assert "train_also" not in make_run()._identified()["protocol"]
    run = make_run(protocol=Protocol(train_also=("bias",)))
    assert Run.from_config(run.as_config()) == run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_also": "norms"}, "Did you mean 'norm'"),
        ({"train_also": "bias,bias"}, "must not repeat"),
        ({"train_also": "bias", "backend": "cerebras"}, "train_also must be empty"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SweepConfig.from_names({"models": ["tiny-llama"], **settings})
