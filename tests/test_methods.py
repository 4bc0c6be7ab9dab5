from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.errors import InputError
from tune_sparse.masks import TOLERANCE, Masks, masked, pruned_count, sparsity_of
from tune_sparse.methods import METHODS, elementwise, make_masks
from tune_sparse.models import (
    PRUNED,
    Shape,
    check_checkpoint,
    load_model,
    prunable_layers,
    prunable_weights,
    write_weights_into,
)

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ELEMENTWISE = [name for name, method in METHODS.items() if method.pattern is elementwise]

Model = tuple[dict[str, Tensor], Shape]


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    weights = prunable_weights(load_model(llama, torch.float32, torch.device("cpu")))
    return weights, check_checkpoint(str(llama)).shape


def test_the_table_has_the_methods_of_the_matrix() -> None:
    assert set(METHODS) >= {"unstructured", "structured", "random"}
    assert set(ELEMENTWISE) >= {"unstructured", "random"}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("method", METHODS)
def test_masks_keep_shape_and_hit_the_target(method: str, sparsity: float, model: Model) -> None:
    weights, shape = model
    masks = make_masks(method, weights, shape, sparsity, seed=0)
    assert list(masks) == list(weights)
    assert {name: mask.shape for name, mask in masks.items()} == {name: w.shape for name, w in weights.items()}
    assert {mask.dtype for mask in masks.values()} == {torch.bool}
    assert all(mask.any() for mask in masks.values())
    assert abs(sparsity_of(masks) - sparsity) <= TOLERANCE


@pytest.mark.parametrize("sparsity", [*SPARSITIES, 0.123, 0.999])
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_elementwise_masks_have_the_exact_count_in_every_matrix(method: str, sparsity: float, model: Model) -> None:
    masks = make_masks(method, *model, sparsity, seed=0)
    assert len(masks) == 21
    for mask in masks.values():
        assert int((~mask).sum()) == pruned_count(mask.numel(), sparsity)


@pytest.mark.parametrize("method", METHODS)
def test_masks_repeat_whatever_the_order_of_the_matrices(method: str, model: Model) -> None:
    weights, shape = model
    first = make_masks(method, weights, shape, 0.5, seed=3)
    torch.manual_seed(99)
    again = make_masks(method, dict(reversed(weights.items())), shape, 0.5, seed=3)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_masks_do_not_change_the_weights(method: str, model: Model) -> None:
    weights, shape = model
    before = {name: weight.clone() for name, weight in weights.items()}
    make_masks(method, weights, shape, 0.5, seed=0)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_at_sparsity_0_everything_is_kept(method: str, model: Model) -> None:
    masks = make_masks(method, *model, 0.0, seed=0)
    assert len(masks) == 21
    assert all(mask.all() for mask in masks.values())


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_elementwise_masks_are_nested_over_the_sparsities(method: str, model: Model) -> None:
    denser = make_masks(method, *model, SPARSITIES[0], seed=0)
    for sparsity in SPARSITIES[1:]:
        sparser = make_masks(method, *model, sparsity, seed=0)
        assert all(bool((sparser[name] <= denser[name]).all()) for name in denser)
        denser = sparser


def test_unstructured_keeps_the_largest_magnitudes_of_each_matrix(model: Model) -> None:
    weights, shape = model
    masks = make_masks("unstructured", weights, shape, 0.7, seed=0)
    for name, mask in masks.items():
        magnitudes = weights[name].abs()
        assert magnitudes[~mask].max() <= magnitudes[mask].min()


def test_only_random_masks_depend_on_the_seed(model: Model) -> None:
    for method in METHODS:
        first, second = (make_masks(method, *model, 0.5, seed) for seed in (0, 1))
        differ = any(not torch.equal(first[name], second[name]) for name in first)
        assert differ == (method == "random")


def test_random_masks_differ_between_matrices_of_one_shape(model: Model) -> None:
    masks = make_masks("random", *model, 0.5, seed=0)
    queries = [mask for name, mask in masks.items() if "q_proj" in name]
    assert len(queries) == 3
    assert not any(torch.equal(queries[i], queries[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_an_unknown_method_offers_the_closest(model: Model) -> None:
    message = "unknown method 'unstructred'. Did you mean 'unstructured' or 'structured'.* Known: random, structured,"
    with pytest.raises(InputError, match=message):
        make_masks("unstructred", *model, 0.5, seed=0)


def block_of(masks: Masks, block: int) -> dict[str, Tensor]:
    """Masks of one block by layer name."""
    return {
        layer: mask
        for name, mask in masks.items()
        for layer in PRUNED
        if f".{block}." in name and name.endswith(f"{layer}.weight")
    }


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_structured_masks_remove_whole_groups_and_channels(sparsity: float, model: Model) -> None:
    weights, shape = model
    masks = make_masks("structured", weights, shape, sparsity, seed=0)
    removed = set()
    for block in range(shape.layers):
        mask = block_of(masks, block)
        queries, keys, channels = mask["q_proj"][:, 0], mask["k_proj"][:, 0], mask["gate_proj"][:, 0]
        groups = keys.view(shape.key_value_heads, -1)[:, 0]
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
    weights, shape = model
    small = with_small_group_and_channel(weights, group, channel=100)
    mask = block_of(make_masks("structured", small, shape, 0.25, seed=0), block=1)
    assert mask["k_proj"][:, 0].view(4, 8).all(dim=1).tolist() == [g != group for g in range(4)]
    assert not mask["gate_proj"][100].any()


@pytest.mark.parametrize("layer", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_one_large_matrix_keeps_its_group_or_channel(layer: str, model: Model) -> None:
    weights, shape = model
    small = with_small_group_and_channel(weights, group=2, channel=100)
    name = next(name for name in small if name.startswith("model.layers.1.") and layer in name)
    small[name] = torch.where(small[name] == weights[name], small[name], weights[name] * 100)
    mask = block_of(make_masks("structured", small, shape, 0.25, seed=0), block=1)
    kept_by_size = mask["gate_proj"][100] if layer in ("gate_proj", "up_proj", "down_proj") else mask["k_proj"][16:24]
    assert kept_by_size.all()


def physically_smaller(model: PreTrainedModel, masks: Masks) -> PreTrainedModel:
    """A stock model of the same class without the rows and columns that are all masked."""
    kept = block_of(masks, 0)
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
    shape = check_checkpoint(str(folder)).shape
    masks = make_masks("structured", prunable_weights(model), shape, sparsity, seed=0)
    write_weights_into(model, masked(prunable_weights(model), masks))
    small = physically_smaller(model, masks)
    ids = torch.arange(2 * 48).view(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    left = sum(layer.weight.numel() for _, layer in prunable_layers(small))
    assert left == round((1 - sparsity_of(masks)) * shape.pruned_weights)
