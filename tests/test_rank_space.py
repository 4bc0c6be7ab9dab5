from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.subadapters import PRESETS
from tune_sparse.errors import InputError
from tune_sparse.lora.rank_space import SAMPLINGS, Group, Space, SuperAdapter, check_space
from tune_sparse.models.architectures import ATTENTION, GATED

SMALL = Space((Group("qkv", ("q_proj", "k_proj"), (8, 4, 2, 0)), Group("up", ("up_proj",), (8, 4))))
SIZES = {
    "model.layers.0.self_attn.q_proj.weight": (4, 6),
    "model.layers.0.mlp.up_proj.weight": (10, 6),
    "model.layers.1.self_attn.k_proj.weight": (2, 6),
    "model.layers.1.mlp.gate_proj.weight": (10, 6),
}
each_preset = pytest.mark.parametrize("name", PRESETS)


@each_preset
def test_every_preset_is_a_space_between_its_smallest_and_largest_configuration(name: str) -> None:
    space = Space.from_groups(PRESETS[name])
    layers = [layer for layer in ATTENTION | GATED if layer.rsplit(".", 1)[-1] in space.modules]
    sizes = {f"model.layers.{n}.{layer}.weight": (3, 5) for n in range(2) for layer in layers}
    small, middle, large = (space.parameters(r(2), sizes) for r in (space.minimal, space.heuristic, space.maximal))
    assert 0 <= small < middle < large
    assert SuperAdapter.from_config(SuperAdapter(space).as_config()) == SuperAdapter(space)


def test_the_heuristic_of_the_papers_spaces_is_the_middle_rank() -> None:
    shears, sqft = (Space.from_groups(PRESETS[name]).heuristic(1) for name in ("shears", "sqft"))
    assert shears == {"l00.qkv": 24, "l00.up": 24, "l00.down": 24}
    assert sqft == {"l00.qkv": 24, "l00.up": 32, "l00.down": 32}


def test_parameters_are_rank_times_both_sides_of_each_adapted_matrix() -> None:
    ranks = {"l00.qkv": 4, "l00.up": 8, "l01.qkv": 0, "l01.up": 4}
    assert SMALL.parameters(ranks, SIZES) == 4 * (4 + 6) + 8 * (10 + 6)
    assert SMALL.active_rank("model.layers.11.mlp.up_proj.weight", {"l11.up": 4, "l01.up": 8}) == 4


@given(step=st.integers(0, 10_000), seed=st.integers(0, 5), sampling=st.sampled_from(tuple(SAMPLINGS)))
def test_a_step_draws_the_same_ranks_whenever_it_is_asked(step: int, seed: int, sampling: str) -> None:
    ranks = SMALL.sample_ranks(3, step, seed, sampling)
    assert ranks == SMALL.sample_ranks(3, step, seed, sampling)
    assert all(rank in SMALL.dimensions(3)[name] for name, rank in ranks.items())


def test_uniform_draws_every_rank_alike_and_sandwich_the_extremes_in_turn() -> None:
    uniform = [SMALL.sample_ranks(1, step, 0, "uniform")["l00.qkv"] for step in range(4000)]
    assert all(900 < uniform.count(rank) < 1100 for rank in (8, 4, 2, 0))
    sandwich = [SMALL.sample_ranks(2, step, 0, "sandwich") for step in range(6)]
    assert sandwich[0] == sandwich[3] == SMALL.maximal(2)
    assert sandwich[1] == sandwich[4] == SMALL.minimal(2)
    assert sandwich[2] != sandwich[5]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "at least one group"),
        ({"up": {"modules": ["up_proj"], "ranks": []}}, "ranks to choose from, 'up' has none"),
        ({"up": {"modules": [], "ranks": [4]}}, "a group needs modules"),
        ({"up": {"modules": ["up_proj"], "ranks": [4, 8]}}, "the largest first"),
        ({"up": {"modules": ["up_proj"], "ranks": [4, -1]}}, "at least 0"),
        ({"up": {"modules": ["up_proj"], "ranks": [0]}}, "a rank above 0"),
        ({"a/b": {"modules": ["up_proj"], "ranks": [4]}}, "letters, digits"),
        ({"up": {"ranks": [4]}}, "maps each group to its modules and ranks"),
        ({"up": 3}, "maps each group to its modules and ranks"),
        ({"a": {"modules": ["up"], "ranks": [4]}, "b": {"modules": ["up"], "ranks": [4]}}, "no module may be in two"),
    ],
)
def test_a_broken_space_is_refused_with_the_rule(groups: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Space.from_groups(groups)


def test_a_space_must_fit_the_model_and_the_super_adapter() -> None:
    check_space(SMALL, ["q_proj", "k_proj", "up_proj"], 8)
    with pytest.raises(InputError, match="above the super-adapter's, 4, the group 'qkv' has 8"):
        check_space(SMALL, ["q_proj", "k_proj", "up_proj"], 4)
    with pytest.raises(InputError, match="unknown module of the group 'up' 'up_proj'"):
        check_space(SMALL, ["q_proj", "k_proj", "fc1"], 8)
    with pytest.raises(InputError, match=r"unknown sampling 'sandwhich'\. Did you mean 'sandwich'"):
        SuperAdapter(SMALL, "sandwhich")
