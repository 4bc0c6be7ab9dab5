from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from plain_masks import make_masks, masked
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.models.architectures import ARCHITECTURES, pruned_weights
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.calibration import CalibrationStats, ModelBlocks
from tune_sparse.pruning.masks import Masks, count_sparsity, keep_highest, mask_sha256, pruned_count
from tune_sparse.pruning.methods import GROUPS, METHODS, TOLERANCE
from tune_sparse.pruning.prune_model import (
    Prunable,
    PrunedMatrix,
    check_method_sparsities,
    measured,
    oriented_scores,
    prune,
    prune_blockwise,
)
from tune_sparse.pruning.streaming import open_checkpoint

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EXAMPLES = [Encoded(tuple(range(i, i + 9)), (i + 3, i + 1, i + 2)) for i in range(6)]

Model = tuple[dict[str, Tensor], ModelDims]


@dataclass(frozen=True)
class Measured:
    """A model and what its calibration examples say."""

    blocks: ModelBlocks
    model: Prunable
    statistics: CalibrationStats

    def masks(self, method: str, sparsity: float, seed: int = 0) -> Masks:
        return {pruned.name: pruned.keep(0) for pruned in self.pruned(method, [sparsity], seed)}

    def pruned(self, method: str, sparsities: Sequence[float], seed: int = 0) -> list[PrunedMatrix]:
        if METHODS[method].updates_weights:
            blocks, statistics = self.blocks, self.statistics
            return list(prune_blockwise(method, self.model, blocks, EXAMPLES, sparsities, seed, statistics))
        return list(prune(method, self.model, sparsities, seed, self.statistics))


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    weights = prunable_weights(load_model(llama, torch.float32, torch.device("cpu")))
    return weights, check_checkpoint(str(llama)).dims


def measured_model(folder: Path) -> Measured:
    checkpoint = open_checkpoint(str(folder))
    blocks = ModelBlocks(load_model(folder, torch.float32, torch.device("cpu")))
    statistics = measured(METHODS.values(), checkpoint.prunable, blocks, EXAMPLES)
    return Measured(blocks, checkpoint.prunable, statistics)


@pytest.fixture(scope="module")
def every(architecture_folders: dict[str, Path]) -> dict[str, Measured]:
    return {name: measured_model(folder) for name, folder in architecture_folders.items()}


@pytest.fixture(scope="module")
def trained(llama: Path) -> Measured:
    return measured_model(llama)


def valid_sparsities(method: str) -> tuple[float, ...]:
    fixed = METHODS[method].fixed_sparsity
    return (fixed,) if fixed is not None else (0.3, 0.5, 0.6)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_hits_its_target_on_every_class(method: str, name: str, every: dict[str, Measured]) -> None:
    model = every[name].model
    sparsities = [0.5] if METHODS[method].pattern in GROUPS else [0.3, 0.5]
    try:
        found = every[name].pruned(method, sparsities)
    except InputError as error:  # a random model may have a whole matrix of tiny gradients
        if METHODS[method].allocation == "global" and "would lose all its" in str(error):
            return
        raise
    assert [pruned.name for pruned in found] == [matrix.name for matrix in model.matrices]
    for level, sparsity in enumerate(sparsities):
        masks = {pruned.name: pruned.keep(level) for pruned in found}
        assert {mask.dtype for mask in masks.values()} == {torch.bool}
        assert {name: mask.shape for name, mask in masks.items()} == {m: model.weights[m].shape for m in masks}
        assert all(mask.any() for mask in masks.values())
        assert abs(count_sparsity(masks) - sparsity) <= TOLERANCE
        if METHODS[method].pattern == "element-wise" and METHODS[method].allocation == "uniform":
            counts = [(int((~mask).sum()), pruned_count(mask.numel(), sparsity)) for mask in masks.values()]
            assert all(lost == target for lost, target in counts)
        for pruned in found:
            weight, dense = pruned.weight(level), model.weights[pruned.name]
            assert (weight.dtype, weight.shape) == (dense.dtype, dense.shape)
            assert not weight[~masks[pruned.name]].any()
            if not METHODS[method].updates_weights:
                assert torch.equal(weight[masks[pruned.name]], dense[masks[pruned.name]])


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_nested_where_the_weights_stay(method: str, trained: Measured) -> None:
    found = trained.pruned(method, valid_sparsities(method))
    if METHODS[method].updates_weights:
        assert all(pruned.levels is None for pruned in found)
        return
    for pruned in found:
        assert pruned.levels is not None
        masks = [pruned.keep(level) for level in range(len(valid_sparsities(method)))]
        assert torch.equal(pruned.levels, torch.stack(masks).sum(dim=0))
        assert all(bool((sparser <= denser).all()) for denser, sparser in pairwise(masks))


@pytest.mark.parametrize("method", METHODS)
def test_levels_together_are_levels_alone(method: str, trained: Measured) -> None:
    sparsities = valid_sparsities(method)
    together = trained.pruned(method, sparsities)
    for level, sparsity in enumerate(sparsities):
        alone = trained.masks(method, sparsity)
        assert all(torch.equal(pruned.keep(level), alone[pruned.name]) for pruned in together)


@pytest.mark.parametrize("method", METHODS)
def test_masks_repeat_and_only_random_ones_depend_on_the_seed(method: str, trained: Measured) -> None:
    torch.manual_seed(99)
    first, again, other = (trained.masks(method, 0.5, seed) for seed in (3, 3, 4))
    assert mask_sha256(first) == mask_sha256(again)
    assert (mask_sha256(first) != mask_sha256(other)) == METHODS[method].needs.seed


@pytest.mark.parametrize("method", ["unstructured", "random", "gradient", "taylor"])
def test_masks_are_those_of_the_plain_definition(method: str, every: dict[str, Measured]) -> None:
    for name, found in every.items():
        for matrix in found.model.matrices:
            weight = matrix.oriented(found.model.weights[matrix.name])
            score = matrix.oriented(oriented_scores(METHODS[method].score, matrix, weight, 7, found.statistics))
            expected = keep_highest(score, pruned_count(weight.numel(), 0.35))
            assert torch.equal(found.masks(method, 0.35, 7)[matrix.name], expected), name
            break


def test_wanda_masks_are_those_of_its_own_code(every: dict[str, Measured]) -> None:
    """Rows of equal counts, as the published code prunes them (lib/prune.py of locuslab/wanda)."""
    for found in every.values():
        masks = found.masks("wanda", 0.5)
        for matrix in found.model.matrices:
            weight = matrix.oriented(found.model.weights[matrix.name])
            metric = weight.abs() * found.statistics.norms[matrix.input_key].reshape(1, -1)
            lowest = metric.sort(dim=-1, stable=True).indices[:, : metric.shape[1] // 2]
            pruned = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, lowest, True)
            assert torch.equal(matrix.oriented(masks[matrix.name]), ~pruned)


@pytest.mark.parametrize("method", ["magnitude-2:4", "wanda-4:8", "sparsegpt-2:4"])
def test_groups_lie_along_the_inputs(method: str, every: dict[str, Measured]) -> None:
    kept, group = GROUPS[METHODS[method].pattern]
    for found in every.values():
        for matrix in found.model.matrices:
            mask = matrix.oriented(found.masks(method, 0.5)[matrix.name])
            assert (mask.reshape(-1, group).sum(dim=1) == kept).all()
            break


def test_global_masks_are_the_lowest_of_all_matrices(trained: Measured) -> None:
    masks = trained.masks("magnitude-global", 0.5)
    weights = trained.model.weights
    together = torch.cat([weights[matrix.name].flatten() for matrix in trained.model.matrices])
    expected = keep_highest(together.abs(), pruned_count(together.numel(), 0.5))
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), expected)
    assert len({round(1 - float(mask.float().mean()), 3) for mask in masks.values()}) > 1


def test_unknown_rows_of_a_multiple_are_refused(trained: Measured) -> None:
    odd = replace(trained.model.dims, intermediate_size=99)
    with pytest.raises(InputError, match="2:4 needs rows of a multiple of 4 weights, the model has rows of 99"):
        check_method_sparsities("wanda-2:4", odd, [0.5])


def test_sequential_pruning_of_the_first_block_is_that_of_the_dense_model(llama: Path, trained: Measured) -> None:
    def found(sequential: bool) -> dict[str, PrunedMatrix]:
        blocks = ModelBlocks(load_model(llama, torch.float32, torch.device("cpu")))
        blockwise = prune_blockwise("wanda", trained.model, blocks, EXAMPLES, [0.5], sequential=sequential)
        pruned = {matrix.name: matrix for matrix in blockwise}
        own = blocks.weights(0)
        changed = any(not own[name].all() for name in own)
        assert changed == sequential
        return pruned

    dense, sequential = found(False), found(True)
    same = {name: torch.equal(dense[name].keep(0), sequential[name].keep(0)) for name in dense}
    assert all(equal for name, equal in same.items() if ".layers.0." in name)
    assert not all(equal for name, equal in same.items() if ".layers.1." in name)


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_at_sparsity_0_everything_is_kept(method: str, model: Model) -> None:
    masks = make_masks(method, *model, 0.0, seed=0)
    assert len(masks) == 21
    assert all(mask.all() for mask in masks.values())


def test_masks_do_not_change_the_weights_and_keep_their_order(model: Model) -> None:
    weights, dims = model
    before = {name: weight.clone() for name, weight in weights.items()}
    backwards = dict(reversed(weights.items()))
    for method in ("unstructured", "structured", "random"):
        masks = make_masks(method, weights, dims, 0.5, seed=0)
        assert list(masks) == list(weights)
        assert mask_sha256(masks) == mask_sha256(make_masks(method, backwards, dims, 0.5, seed=0))
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_random_masks_differ_between_matrices_of_one_shape(model: Model) -> None:
    masks = make_masks("random", *model, 0.5, seed=0)
    queries = [mask for name, mask in masks.items() if "q_proj" in name]
    assert len(queries) == 3
    assert not any(torch.equal(queries[i], queries[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_an_unknown_method_offers_the_closest(model: Model) -> None:
    with pytest.raises(InputError, match=r"unknown method 'unstructred'\. Did you mean 'unstructured' or 'structured'"):
        make_masks("unstructred", *model, 0.5, seed=0)


def select_block(masks: Masks, block: int) -> dict[str, Tensor]:
    """Masks of one block by layer name."""
    return {
        layer: mask
        for name, mask in masks.items()
        for layer in ARCHITECTURES["LlamaForCausalLM"].modules
        if f".{block}." in name and name.endswith(f"{layer}.weight")
    }


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_structured_masks_remove_whole_groups_and_channels(sparsity: float, model: Model) -> None:
    weights, dims = model
    masks = make_masks("structured", weights, dims, sparsity, seed=0)
    removed = set()
    for block in range(dims.num_layers):
        mask = select_block(masks, block)
        queries, keys, channels = mask["q_proj"][:, 0], mask["k_proj"][:, 0], mask["gate_proj"][:, 0]
        groups = keys.view(dims.num_kv_heads, -1)[:, 0]
        assert torch.equal(keys, groups.repeat_interleave(8))
        assert torch.equal(queries, groups.repeat_interleave(16))
        for layer, rows in {"q_proj": queries, "k_proj": keys, "v_proj": keys}.items():
            assert torch.equal(mask[layer], rows[:, None].expand(-1, 64))
        assert torch.equal(mask["o_proj"], queries[None].expand(64, -1))
        assert torch.equal(mask["up_proj"], channels[:, None].expand(-1, 64))
        assert torch.equal(mask["gate_proj"], mask["up_proj"])
        assert torch.equal(mask["down_proj"], channels[None].expand(64, -1))
        removed.add((int((~groups).sum()), int((~channels).sum())))
    assert len(removed) == 1, "every block loses the same number"


def with_small_group_and_channel(weights: dict[str, Tensor], group: int, channel: int) -> dict[str, Tensor]:
    """Copies whose second block has one key/value group and one channel a thousand times smaller."""
    small = {name: weight.clone() for name, weight in weights.items()}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    small[f"{attention}.q_proj.weight"][16 * group : 16 * (group + 1)] *= 1e-3
    small[f"{attention}.k_proj.weight"][8 * group : 8 * (group + 1)] *= 1e-3
    small[f"{attention}.v_proj.weight"][8 * group : 8 * (group + 1)] *= 1e-3
    small[f"{attention}.o_proj.weight"][:, 16 * group : 16 * (group + 1)] *= 1e-3
    small[f"{mlp}.gate_proj.weight"][channel] *= 1e-3
    small[f"{mlp}.up_proj.weight"][channel] *= 1e-3
    small[f"{mlp}.down_proj.weight"][:, channel] *= 1e-3
    return small


@pytest.mark.parametrize("group", range(4))
def test_structured_removes_the_group_and_channel_of_smallest_norm(group: int, model: Model) -> None:
    weights, dims = model
    small = with_small_group_and_channel(weights, group, channel=100)
    mask = select_block(make_masks("structured", small, dims, 0.25, seed=0), block=1)
    assert mask["k_proj"][:, 0].view(4, 8).all(dim=1).tolist() == [g != group for g in range(4)]
    assert not mask["gate_proj"][100].any()


@pytest.mark.parametrize("layer", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_one_large_matrix_keeps_its_group_or_channel(layer: str, model: Model) -> None:
    weights, dims = model
    small = with_small_group_and_channel(weights, group=2, channel=100)
    name = next(name for name in small if name.startswith("model.layers.1.") and layer in name)
    small[name] = torch.where(small[name] == weights[name], small[name], weights[name] * 100)
    mask = select_block(make_masks("structured", small, dims, 0.25, seed=0), block=1)
    kept_by_size = mask["gate_proj"][100] if layer in ("gate_proj", "up_proj", "down_proj") else mask["k_proj"][16:24]
    assert kept_by_size.all()


def physically_smaller(model: PreTrainedModel, masks: Masks) -> PreTrainedModel:
    """A stock model of the same class without the rows and columns that are all masked."""
    kept = select_block(masks, 0)
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = int(kept["k_proj"].any(1).sum()) // config.head_dim
    config.num_attention_heads = int(kept["q_proj"].any(1).sum()) // config.head_dim
    config.intermediate_size = int(kept["gate_proj"].any(1).sum())
    state = model.state_dict()
    for name, mask in masks.items():
        state[name] = state[name][mask.any(1)][:, mask.any(0)]
    small = type(model)(config)
    small.load_state_dict(state)
    return small.eval()


@pytest.fixture(params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_a_structured_model_computes_the_same_as_a_physically_smaller_one(folder: Path, sparsity: float) -> None:
    model = load_model(folder, torch.float32, torch.device("cpu"))
    dims = check_checkpoint(str(folder)).dims
    masks = make_masks("structured", prunable_weights(model), dims, sparsity, seed=0)
    write_weights_into(model, masked(prunable_weights(model), masks))
    small = physically_smaller(model, masks)
    ids = torch.arange(2 * 48).view(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    left = sum(weight.numel() for weight in prunable_weights(small).values())
    assert left == round((1 - count_sparsity(masks)) * pruned_weights(dims))
