"""Models pruned where they stand: the masks and weights of the plain definition, in one copy of the weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from factories import tiny_run
from live_bytes import LiveBytes
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainables.worker import WorkerCache
from tune_sparse.data.splits import Encoded
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.architectures import read_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.calibration import ModelBlocks, calibrate_blockwise
from tune_sparse.pruning.masks import keep_highest
from tune_sparse.pruning.methods import method_named
from tune_sparse.pruning.prune_into import Calibration, prune_into
from tune_sparse.pruning.prune_model import Prunable, measured, prune, prune_blockwise

EXAMPLES = [Encoded(tuple(range(i, i + 12)), tuple(range(i + 12, i + 20))) for i in range(1, 65, 8)]
FUSED_AND_TURNED = ["LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"]
"""A plain class, one whose matrices are views of fused experts, and one that stores them transposed."""


@pytest.fixture
def model(request: pytest.FixtureRequest, architecture_folders: dict[str, Path]) -> PreTrainedModel:
    folder = architecture_folders[request.param]
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()


def calibration(model: PreTrainedModel, method: str, sequential: bool = False) -> Calibration:
    prunable = Prunable.from_weights(read_weights(model), ModelDims.from_config(model.config))
    statistics = measured([method_named(method)], prunable, ModelBlocks(model), EXAMPLES)
    return Calibration(EXAMPLES, statistics, sequential)


def beside(model: PreTrainedModel, method: str, sparsity: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(masks, weights) as a method that writes nowhere makes them from a copy of the dense weights."""
    dense = {name: weight.clone() for name, weight in read_weights(model).items()}
    prunable, known = Prunable.from_weights(dense, ModelDims.from_config(model.config)), calibration(model, method)
    found = (
        prune_blockwise(method, prunable, ModelBlocks(model), EXAMPLES, [sparsity], 0, known.statistics)
        if method_named(method).updates_weights
        else prune(method, prunable, [sparsity], 0, known.statistics)
    )
    kept = list(found)
    return {pruned.name: pruned.keep(0) for pruned in kept}, {pruned.name: pruned.weight(0) for pruned in kept}


@pytest.mark.parametrize(
    ("method", "model"),
    [(method, "LlamaForCausalLM") for method in ("random", "wanda-owl", "sparsegpt-2:4")]
    + [(method, name) for method in ("unstructured", "structured", "wanda", "sparsegpt") for name in FUSED_AND_TURNED]
    + [("taylor-global", "MixtralForCausalLM")],
    indirect=["model"],
)
def test_a_model_is_pruned_in_place_as_beside_it(method: str, model: PreTrainedModel) -> None:
    masks, weights = beside(model, method, 0.5)
    found = prune_into(model, method, ModelDims.from_config(model.config), 0.5, 0, calibration(model, method))
    assert list(found) == list(masks)
    for name, own in read_weights(model).items():
        assert torch.equal(found[name], masks[name]), name
        assert torch.equal(own, weights[name]), name


@pytest.mark.parametrize("model", ["LlamaForCausalLM"], indirect=True)
def test_magnitudes_are_pruned_by_the_plain_definition(model: PreTrainedModel) -> None:
    expected = {n: keep_highest(w.abs(), round(0.3 * w.numel())) for n, w in read_weights(model).items()}
    found = prune_into(model, "unstructured", ModelDims.from_config(model.config), 0.3)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("model", ["LlamaForCausalLM", "MixtralForCausalLM"], indirect=True)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "wanda-structured"])
def test_in_sequence_each_block_reads_what_the_pruned_ones_before_it_compute(
    method: str, model: PreTrainedModel
) -> None:
    dims = ModelDims.from_config(model.config)
    found = prune_into(model, method, dims, 0.5, 0, calibration(model, method, sequential=True))
    pruned = {name: weight.clone() for name, weight in read_weights(model).items()}
    assert all(not weight[~found[name]].any() for name, weight in pruned.items())
    # The last block's inputs, as the model computes them now, are those that its masks were made from.
    again = dict(calibrate_blockwise(ModelBlocks(model), EXAMPLES))
    if method == "wanda":
        dense = AutoModelForCausalLM.from_pretrained(model.name_or_path)
        for matrix in ModelBlocks(model).matrices:
            if matrix.block == dims.num_layers - 1 and matrix.role in ("q", "kv"):
                scores = read_weights(dense)[matrix.name].abs() * again[matrix.block][matrix.input_key].norms
                rows = [keep_highest(row, len(row) // 2) for row in scores]
                assert torch.equal(found[matrix.name], torch.stack(rows))


@pytest.mark.parametrize("model", ["LlamaForCausalLM"], indirect=True)
@pytest.mark.parametrize("method", ["unstructured", "structured", "wanda", "sparsegpt", "taylor-2:4"])
def test_nothing_is_pruned_at_sparsity_0(method: str, model: PreTrainedModel) -> None:
    before = {name: weight.clone() for name, weight in read_weights(model).items()}
    found = prune_into(model, method, ModelDims.from_config(model.config), 0.0)
    assert found.sparsity == 0
    assert all(torch.equal(own, before[name]) for name, own in read_weights(model).items())


def test_sums_of_gradients_stay_for_one_calibration_set_at_a_time(llama: Path) -> None:
    worker = WorkerCache()
    measure = worker.pruner._measured
    runs = [
        tiny_run(llama, method=method, calibration_tokens=count) for method in ("wanda", "taylor") for count in (40, 60)
    ]
    loaded = worker.model(runs[0])
    found = [weakref.ref(measure(run, loaded, EXAMPLES)) for run in runs]
    assert measure(runs[-1], loaded, EXAMPLES) is found[-1](), "measured once"
    assert [statistics() is None for statistics in found] == [False, False, True, False]


@pytest.fixture(scope="module")
def wide_worker(wide_llama: Path) -> Iterator[tuple[WorkerCache, int]]:
    """A worker with the wide model, and the most bytes that lived while it was loaded."""
    worker = WorkerCache()
    with LiveBytes() as live:
        worker.model(tiny_run(wide_llama, precision="bfloat16"))
    yield worker, live.peak
    worker.clear()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unstructured", "structured", "wanda", "sparsegpt"])
def test_loading_and_pruning_hold_one_copy_of_the_weights(
    method: str, wide_worker: tuple[WorkerCache, int], wide_llama: Path, tmp_path: Path
) -> None:
    worker, loading = wide_worker
    run = tiny_run(wide_llama, precision="bfloat16", method=method)
    loaded = worker.model(run)
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    train = worker.examples(run, loaded).train
    with LiveBytes(*loaded.model.parameters()) as live:
        pruned = worker.pruner.prune_into(run, loaded, train, Ledger(tmp_path))
    print(f"{method}: load {loading / weights:.3f}, prune {live.peak / weights:.3f}, after {live.bytes / weights:.3f}")
    assert loading <= 1.6 * weights
    assert live.peak <= 1.6 * weights
    own = read_weights(loaded.model)
    for name in list(own)[::20]:
        assert torch.equal(pruned.weights[name].view(torch.int16), own[name].view(torch.int16)), "to the last bit"


@pytest.mark.parametrize(
    ("method", "model"),
    [(method, "LlamaForCausalLM") for method in ("random", "wanda-owl", "magnitude-global")]
    + [(method, name) for method in ("unstructured", "structured", "wanda", "sparsegpt") for name in FUSED_AND_TURNED],
    indirect=["model"],
)
def test_what_is_pruned_stays_pruned_when_a_changed_model_is_pruned_further(
    method: str, model: PreTrainedModel
) -> None:
    dims, generator = ModelDims.from_config(model.config), torch.Generator().manual_seed(0)
    before = prune_into(model, method, dims, 0.25, 0, calibration(model, method))
    for name, own in read_weights(model).items():
        moved = torch.randn(own.shape, generator=generator) * 0.1
        moved[torch.rand(own.shape, generator=generator) < 0.1] = 0  # kept weights that happen to be 0
        own.copy_(moved * before[name])
    found = prune_into(model, method, dims, 0.5, 0, calibration(model, method), before)
    assert abs(found.sparsity - 0.5) < 0.01
    for name, own in read_weights(model).items():
        assert not (found[name] & ~before[name]).any(), name
        assert not own[~found[name]].any()
        if method not in ("wanda-owl", "magnitude-global", "structured"):
            assert found.kept[name] == own.numel() - round(0.5 * own.numel())


@pytest.mark.parametrize("model", ["LlamaForCausalLM"], indirect=True)
def test_the_smallest_of_the_kept_weights_go_next(model: PreTrainedModel) -> None:
    dims = ModelDims.from_config(model.config)
    weights = {name: weight.clone() for name, weight in read_weights(model).items()}
    before = prune_into(model, "unstructured", dims, 0.3)
    found = prune_into(model, "unstructured", dims, 0.6, kept=before)
    assert (
        found.sha256
        == BitMasks.pack((n, keep_highest(w.abs(), round(0.6 * w.numel()))) for n, w in weights.items()).sha256
    )
