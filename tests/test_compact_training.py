"""Structured sparse-to-sparse cells, trained on the physically smaller model: the numbers of the masked model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import TINY_PROTOCOL, finished, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from peft import PeftModel
from plain_masks import make_masks, masked
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.models.mistral import modeling_mistral

from trainables import lora_finetuning
from trainables.lora_finetuning import LoraFinetuning
from trainables.pipeline import run_cell
from trainables.rebuild import deployed_by
from trainables.worker import WorkerCache
from tune_sparse.config import Protocol
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import RunError
from tune_sparse.evaluation.validation import weights_sha256
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.lora import compact_training
from tune_sparse.lora.adapter_io import WEIGHTS, load_adapter, read_marker
from tune_sparse.lora.compact_training import Cut, Cuts, Whole, expand_into, find_cuts, shrink_into
from tune_sparse.lora.layer import count_impls, sparse_lora_layers
from tune_sparse.lora.rank_space import Space, SuperAdapter
from tune_sparse.models.architectures import list_matrices
from tune_sparse.models.checkpoints import prunable_weights, write_weights_into
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.masks import Masks, channel_mask, kept_channels
from tune_sparse.search.scorer import SliceScorer
from tune_sparse.training.loop import fit

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 48}
SIZES |= {"vocab_size": 40, "initializer_range": 0.2}
EXAMPLES = [Encoded(tuple(range(i, i + 9 + i)), (i, i + 1)) for i in range(8)]
PROTOCOL = replace(TINY_PROTOCOL, steps=5, max_grad_norm=0.3, weight_decay=0.5)


def small_llama() -> PreTrainedModel:
    """Two heads share a key/value head of 6 values; its projections have biases."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4, head_dim=6, attention_bias=True, mlp_bias=True))


def small_mistral() -> PreTrainedModel:
    """A window of four tokens."""
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4))


def uneven_masks(model: PreTrainedModel) -> Masks:
    """The first block loses a group and a channel, the second all but the last group and seven channels."""
    dims = ModelDims.from_config(model.config)
    masks = {}
    for matrix in list_matrices(model):
        groups, channels = torch.arange(dims.num_kv_heads), torch.arange(dims.intermediate_size)
        kept = (groups != 1, channels != 5) if matrix.block == 0 else (groups == len(groups) - 1, channels % 7 == 2)
        masks[matrix.name] = channel_mask(matrix, dims, kept_channels(matrix, dims, *kept)).contiguous()
    return masks


def structured_masks(model: PreTrainedModel) -> Masks:
    return make_masks("structured", prunable_weights(model), ModelDims.from_config(model.config), 0.5, seed=0)


CASES = [(small_llama, structured_masks), (small_llama, uneven_masks), (small_mistral, structured_masks)]


def make_pruned(make: Callable[[], PreTrainedModel], find: Callable[..., Masks]) -> tuple[PreTrainedModel, Masks]:
    """A pruned model in float64, where the order of additions hardly matters, with its masks."""
    torch.manual_seed(0)
    model = make().double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    masks = find(model)
    write_weights_into(model, masked(prunable_weights(model), masks))
    return model.eval(), masks


def set_up(model: PreTrainedModel, masks: Masks, **changes: Any) -> LoraFinetuning:
    trainable = lora_finetuning.setup("sparse-to-sparse", model, replace(PROTOCOL, **changes), masks, seed=3)
    trainable.adapted.double()
    return trainable


def train(trainable: LoraFinetuning, **changes: Any) -> list[float]:
    protocol: Protocol = replace(PROTOCOL, **changes)
    with trainable.shrunk():
        optimizer = trainable.optimizer(protocol)
        return [step.loss for step in fit(trainable.model, optimizer, EXAMPLES, protocol, seed=0)]


def merged(adapted: PeftModel) -> dict[str, Tensor]:
    return {name: layer.merged_weight().clone() for name, layer in sparse_lora_layers(adapted)}


@pytest.mark.parametrize(("make", "find"), CASES)
def test_the_smaller_model_trains_as_the_masked_one(make: Any, find: Any) -> None:
    """Loss after loss and weight by weight, with clipping and weight decay. Rows and columns that the masked one keeps
    decaying are zero here, and mean nothing."""
    model, masks = make_pruned(make, find)
    whole = set_up(copy.deepcopy(model), masks, masked_lora_impl="effective-weight")
    small = set_up(model, masks)
    assert whole.cuts is None
    assert small.is_merged_exactly
    losses = train(small)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(train(whole)), rtol=1e-9, atol=0)
    assert losses[-1] < losses[0]
    expected = merged(whole.adapted)
    for name, weight in merged(small.adapted).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)
        assert not weight[~masks[name]].any()
    assert count_impls(small.adapted) == {"effective-weight": 14}


@pytest.mark.parametrize(("make", "find"), CASES)
@torch.no_grad()
def test_a_model_is_smaller_while_it_trains_computes_the_same_and_comes_back_to_the_last_bit(
    make: Any, find: Any
) -> None:
    model, masks = make_pruned(make, find)
    trainable, ids = set_up(model, masks), torch.arange(40).view(2, 20)
    for _, layer in sparse_lora_layers(trainable.adapted):
        layer.factors()[1].normal_(std=0.1)
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, model(ids).logits
    with trainable.shrunk():
        left = sum(layer.base_layer.weight.numel() for _, layer in sparse_lora_layers(trainable.adapted))
        assert left == sum(int(masks[name].sum()) for name in masks)
        torch.testing.assert_close(model(ids).logits, expected)
        assert trainable.factor_weights == sum(
            PROTOCOL.lora_rank * int(masks[name].any(dim=dim).sum()) for name in masks for dim in (0, 1)
        )
    after = model.state_dict()
    for name in before:
        if "lora_" not in name:
            assert torch.equal(after[name], before[name]), name
    assert torch.equal(model(ids).logits, expected)


def test_adapters_begin_as_slices_of_the_whole_draw_and_end_as_zeros_where_they_were_cut() -> None:
    model, masks = make_pruned(small_llama, structured_masks)
    trainable = set_up(model, masks)
    drawn = {name: layer.factors()[0].detach().clone() for name, layer in sparse_lora_layers(trainable.adapted)}
    with trainable.shrunk():
        for name, layer in sparse_lora_layers(trainable.adapted):
            assert torch.equal(layer.factors()[0], drawn[name][:, masks[name].any(dim=0)])
            assert not layer.factors()[1].any()
    train(trainable)
    for name, layer in sparse_lora_layers(trainable.adapted):
        A, B, scaling = layer.factors()
        assert not A[:, ~masks[name].any(dim=0)].any()
        assert not B[~masks[name].any(dim=1)].any()
        assert scaling == PROTOCOL.lora_alpha / PROTOCOL.lora_rank


def test_a_saved_adapter_loads_on_the_whole_pruned_model(tmp_path: Path) -> None:
    model, masks = make_pruned(small_mistral, structured_masks)
    again, trainable = copy.deepcopy(model).float(), set_up(model.float(), masks)
    trainable.adapted.float()
    train(trainable)
    trainable.save(tmp_path)
    marker = read_marker(tmp_path / "adapter")
    assert marker is not None
    assert (marker.mode, marker.trained_compact) == ("sparse-to-sparse", True)
    loaded = load_adapter(again, tmp_path / "adapter")
    expected = merged(trainable.adapted)
    assert all(torch.equal(weight, expected[name]) for name, weight in merged(loaded).items())


def test_masks_alone_decide_what_is_trained_small() -> None:
    model, masks = make_pruned(small_llama, structured_masks)
    dims = ModelDims.from_config(model.config)
    assert find_cuts(dims, masks) is not None
    q, up = (next(name for name in masks if part in name) for part in ("q_proj", "up_proj"))
    by_rows = {name: (torch.arange(len(mask)) % 2 == 0)[:, None].expand_as(mask) for name, mask in masks.items()}
    for other in (
        {name: torch.rand(mask.shape) > 0.5 for name, mask in masks.items()},
        dict(masks) | {up: masks[up].roll(1, dims=0)},
        dict(masks) | {q: masks[q].roll(6, dims=0)},
        by_rows,
    ):
        assert find_cuts(dims, other) is None
    for mode in ("dense", "sparse-to-dense"):
        assert lora_finetuning.setup(mode, copy.deepcopy(model), PROTOCOL, masks, seed=0).cuts is None
    assert set_up(model, masks, masked_lora_impl="effective-weight").cuts is None


def test_dropout_acts_on_the_inputs_that_are_left() -> None:
    model, masks = make_pruned(small_mistral, structured_masks)
    trainable = set_up(model, masks, lora_dropout=0.5)
    losses = train(trainable, lora_dropout=0.5)
    assert losses[-1] < losses[0]
    assert all(not weight[~masks[name]].any() for name, weight in merged(trainable.adapted).items())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1), st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 4))
def test_a_cut_is_put_back_among_zeros(along: int, keep: list[bool], width: int) -> None:
    kept = torch.tensor(keep)
    cut = Cut(along, kept.nonzero().flatten(), len(keep))
    whole = 1 + torch.arange(len(keep) * width).view(len(keep), width)
    mask = kept[:, None].expand_as(whole)
    whole, mask = (whole.T, mask.T) if along else (whole, mask)
    block = cut.cut_out(whole)
    assert block.shape[along] == sum(keep)
    assert torch.equal(cut.put_back(block), whole * mask)


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Ledger, Record]:
    """A whole cell that trained small."""
    run, ledger = tiny_run(llama, method="structured", weight_decay=0.5), Ledger(tmp_path_factory.mktemp("compact"))
    return run, ledger, finished(run, ledger)


def test_a_cell_scores_as_the_masked_one_for_the_cost_of_the_smaller_model(
    made: tuple[Run, Ledger, Record], llama: Path, tmp_path: Path
) -> None:
    run, ledger, record = made
    assert record.status == "done", record.error
    whole = tiny_run(llama, method="structured", weight_decay=0.5, masked_lora_impl="effective-weight")
    masked_record = finished(whole, Ledger(tmp_path))
    assert record.metrics["train_loss"] == pytest.approx(masked_record.metrics["train_loss"], rel=1e-4)
    for name in ("mask_sha256", "actual_sparsity", "accuracy_before_tuning", "n_examples", "inference_flops"):
        assert record.metrics[name] == masked_record.metrics[name]
    folder = ledger.run_folder(run.run_id)
    assert (
        "effective-weight, on the smaller model without masked heads and channels" in (folder / "train.log").read_text()
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "adapter" / WEIGHTS).items()}
    masked_folder = Ledger(tmp_path).run_folder(whole.run_id)
    assert shapes == {n: tuple(t.shape) for n, t in load_file(masked_folder / "adapter" / WEIGHTS).items()}


def test_a_cell_that_trained_small_is_merged_again_to_the_same_bits(made: tuple[Run, Ledger, Record]) -> None:
    run, ledger, record = made
    loaded, _ = deployed_by(run, ledger, WorkerCache())
    assert weights_sha256(prunable_weights(loaded.model)) == record.metrics["weights_sha256"]


def test_a_killed_training_goes_on_small(
    made: tuple[Run, Ledger, Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, record = made
    monkeypatch.setattr("trainables.training.CHECKPOINT_SECONDS", 0.0)
    ledger, worker = Ledger(tmp_path), WorkerCache()
    steps = run_cell(run, ledger, worker)
    next(steps), next(steps)
    steps.close()
    state = torch.load(ledger.checkpoint(run.run_id), weights_only=True)
    sizes = sum(parameter.numel() for parameter in state["parameters"])
    again = finished(run, ledger, worker)
    whole = load_file(ledger.run_folder(run.run_id) / "adapter" / WEIGHTS)
    assert sizes < sum(tensor.numel() for tensor in whole.values())
    assert again.metrics == record.metrics
    assert "goes on after step" in (ledger.run_folder(run.run_id) / "train.log").read_text()


def test_a_worker_serves_another_cell_after_one_that_trained_small(
    made: tuple[Run, Ledger, Record], llama: Path, tmp_path: Path
) -> None:
    run, _, _ = made
    other, worker = tiny_run(llama, mode="sparse-to-dense"), WorkerCache()
    finished(run, Ledger(tmp_path / "one"), worker)
    metrics = finished(other, Ledger(tmp_path / "one"), worker).metrics
    assert worker.loads == 1
    assert metrics == finished(other, Ledger(tmp_path / "two")).metrics


def test_a_super_adapter_trains_small_and_its_slices_deploy_on_the_whole_model(llama: Path, tmp_path: Path) -> None:
    space = Space.from_groups({"qkv": {"modules": ["q_proj", "v_proj"], "ranks": [4, 2, 1]}})
    run = replace(tiny_run(llama, method="structured"), super_adapter=SuperAdapter(space))
    ledger = Ledger(tmp_path)
    assert finished(run, ledger).status == "done"
    scorer = SliceScorer.from_run(run, ledger)
    assert scorer.slices.marker.trained_compact
    scorer.finish(space.heuristic(3), tmp_path / "finished")


def test_a_class_that_counts_its_heads_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers once did: heads of the configuration, and values each as many as are left."""
    model, masks = make_pruned(small_mistral, structured_masks)
    trainable = set_up(model, masks)
    shrink = compact_training.shrink_into

    def misread(adapted: PeftModel, cuts: Cuts) -> Whole:
        whole = shrink(adapted, cuts)
        for block in model.model.layers:
            block.self_attn.head_dim //= 2
        return whole

    monkeypatch.setattr(compact_training, "shrink_into", misread)
    monkeypatch.setattr(modeling_mistral, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
    with pytest.raises(RunError, match=r"must compute what the whole one does within 1e-08, got .* after the first"):
        trainable.shrunk().__enter__()


def test_no_second_copy_of_the_weights_is_made() -> None:
    model, masks = make_pruned(small_llama, structured_masks)
    trainable = set_up(model, masks)
    assert trainable.cuts is not None
    tensors = [*model.parameters(), *model.buffers(), *(cut.kept for cut in trainable.cuts.values())]
    largest = max(weight.nbytes for weight in tensors)
    with LiveBytes(*tensors) as live:
        whole = live.bytes
        rest = shrink_into(trainable.adapted, trainable.cuts)
        small = live.bytes
        expand_into(trainable.adapted, trainable.cuts, rest)
        assert live.peak <= whole + largest
    assert 0.4 * whole < small < 0.7 * whole
    assert live.bytes == whole
