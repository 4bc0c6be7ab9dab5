from __future__ import annotations

import pytest

from search_spaces.matrix import PILOT_SPARSITIES, PRESETS, cells
from tune_sparse.config import SweepConfig
from tune_sparse.config.protocol import OTHER_WEIGHTS
from tune_sparse.models.from_scratch import FROM_SCRATCH
from tune_sparse.sweep.plan import check_names, distinct_trainings, requested_cells

SIZES = {
    "toy": (360, 330),
    "matrix": (360, 330),
    "smoke": (24, 14),
    "toy-seeds": (108, 90),
    "dst": (288, 234),
    "shakespeare": (7, 7),
    "shakespeare-124m": (21, 21),
    "prune-and-tune": (108, 183),
    "smollm": (192, 150),
    "mixtral": (180, 165),
    "phoenix": (1200, 1100),
}
SHAKESPEARE = ("shakespeare", "shakespeare-124m")
REAL = ("smollm", "matrix", "mixtral", "phoenix")


def preset(name: str) -> SweepConfig:
    return SweepConfig.from_names({"preset": name})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_sound_configuration(name: str) -> None:
    check_names(preset(name))


def test_there_is_a_preset_and_a_pilot_for_each_study() -> None:
    studies = ["toy", "smoke", "toy-seeds", "dst", *SHAKESPEARE, "prune-and-tune", *REAL]
    assert sorted(PRESETS) == sorted([*studies, *(f"{name}-pilot" for name in studies), "pilot"])


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_a_preset_has_its_cells_and_its_distinct_trainings(name: str, size: tuple[int, int]) -> None:
    config = preset(name)
    assert (len(set(requested_cells(config))), distinct_trainings(config)) == size


@pytest.mark.parametrize("name", ["toy", "matrix"])
def test_36_cells_at_zero_share_6_trainings(name: str) -> None:
    unpruned = [cell for cell in requested_cells(preset(name)) if cell.sparsity == 0]
    assert (len(unpruned), len({cell.trained for cell in unpruned})) == (36, 6)


def test_the_smoke_cells_are_toy_cells_under_the_same_protocol() -> None:
    smoke, toy = preset("smoke"), preset("toy")
    assert set(requested_cells(smoke)) < set(requested_cells(toy))
    assert smoke.protocol == toy.protocol


@pytest.mark.parametrize("name", [name for name in PRESETS if "pilot" in name])
def test_a_pilot_is_its_study_at_three_sparsities(name: str) -> None:
    study = PRESETS[name.removesuffix("-pilot") if name != "pilot" else "toy"]
    assert PRESETS[name] == study | {"sparsities": PILOT_SPARSITIES}
    assert preset(name).sparsities == (0.0, 0.5, 0.9)


@pytest.mark.parametrize("name", ["prune-and-tune", *REAL])
def test_models_of_the_hub_are_pinned_to_a_revision(name: str) -> None:
    for model in preset(name).models:
        _, _, revision = model.partition("@")
        assert len(revision) == 40
        int(revision, 16)


def test_a_preset_from_scratch_trains_all_weights_in_pieces_as_long_as_its_model_reads() -> None:
    for config in map(preset, SHAKESPEARE):
        assert set(config.protocol.train_also) == set(OTHER_WEIGHTS)
        assert all(config.protocol.max_tokens <= FROM_SCRATCH[model]["n_positions"] for model in config.models)


def test_cells_are_every_combination_with_the_first_axis_slowest() -> None:
    assert list(cells({"a": (1, 2), "b": "xy"})) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_an_empty_axis_spans_no_cells() -> None:
    assert list(cells({"a": (1, 2), "b": ()})) == []
