"""GPUs as their driver names them, and sweeps that none of them can hold: refused before anything is computed."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from factories import make_cell, make_run

from tune_sparse.config import Protocol, SweepConfig
from tune_sparse.errors import InputError, TooLargeError
from tune_sparse.evaluation.card_budgets import budgets_for
from tune_sparse.evaluation.cards import CARDS, card_named, find_card
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.models.dims import ModelDims
from tune_sparse.sweep.cards import Device, block_kinds, check_devices, cluster_devices, gpu_kinds, local_devices
from tune_sparse.sweep.resources import Placement

LLAMA_7B = ModelDims(4096, 32, 32, 32, 128, 11008, 32000, None, 4096)
TINY = replace(LLAMA_7B, num_layers=1, hidden_size=64, intermediate_size=128)
SMI = """0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559, 9.0
1, GPU-bb22, Tesla V100-SXM2-32GB, 32768, 7.0
2, GPU-cc33, NVIDIA GeForce RTX 4090, 24564, 8.9
"""
H100 = Device("NVIDIA H100 80GB HBM3", 81559 << 20, True)
V100 = Device("Tesla V100-SXM2-32GB", 32768 << 20, False)
RTX = Device("NVIDIA GeForce RTX 4090", 24564 << 20, True)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose driver says that it has three GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def config(**settings: object) -> SweepConfig:
    return SweepConfig(models=("tiny",), **settings)  # type: ignore[arg-type]


def check(sweep: SweepConfig, *devices: Device, dims: ModelDims = LLAMA_7B, **cell: str) -> None:
    check_devices(sweep, [make_run(make_cell(**cell))], {"tiny": dims}, devices)


def test_the_driver_names_the_gpus(driver: Path) -> None:
    assert local_devices() == (H100, V100, RTX)


@pytest.mark.parametrize(
    ("visible", "expected"), [("", ()), ("2,0", (H100, RTX)), ("GPU-bb", (V100,)), ("GPU-cc33, 1", (V100, RTX))]
)
def test_hidden_gpus_are_not_there(
    driver: Path, monkeypatch: pytest.MonkeyPatch, visible: str, expected: tuple[Device, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_devices() == expected


@pytest.mark.parametrize("text", ["exit 9", "echo NVIDIA-SMI has failed"])
def test_a_driver_that_fails_names_none(driver: Path, text: str) -> None:
    driver.write_text(f"#!/bin/sh\n{text}\n")
    assert local_devices() == ()


@pytest.mark.parametrize(
    ("name", "memory_bytes", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 81559 << 20, "H100-80"),
        ("NVIDIA A100-SXM4-40GB", 42.4e9, "A100-40"),
        ("NVIDIA A100-SXM4-80GB", 85.0e9, "A100-80"),
        ("Tesla V100-SXM2-32GB", 34e9, "V100-32"),
        ("NVIDIA GeForce RTX 4090", 25.7e9, "RTX-4090"),
        ("A100", float("inf"), "A100-80"),
        ("AMD Instinct MI300X", 2e11, None),
    ],
)
def test_a_card_is_found_by_what_its_driver_calls_it(name: str, memory_bytes: float, expected: str | None) -> None:
    found = find_card(name, memory_bytes)
    assert (found.name if found else None) == expected


def test_an_unknown_card_is_refused_by_name() -> None:
    assert card_named("H200") is CARDS["H200"]
    assert [card_named(name).name for name in ("H100", "A100", "l4")] == ["H100-80", "A100-80", "L4"]
    with pytest.raises(InputError, match=r"unknown GPU 'H101'\. Did you mean .*'H100-80'"):
        card_named("H101")


def test_the_gpus_of_a_cluster_are_known_by_their_kind() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0}, {"CPU": 8.0, "accelerator_type:T4": 1.0}]
    assert [kind for node in nodes for kind in gpu_kinds(node)] == ["A100"], "the other has no GPU to give"
    assert cluster_devices(nodes) == (Device("A100", 81_920 << 20, True),)


def test_a_large_model_beside_gpus_needs_one_asked_for() -> None:
    with pytest.raises(InputError, match=r"needs a GPU, tiny has 6\.7e9, .*Give --gpus-per-trial 1"):
        check(config(), H100)
    check(config())
    check(config(), H100, dims=TINY)
    check(config(gpus_per_trial=1.0), H100)


def test_bfloat16_is_refused_on_cards_that_lack_it() -> None:
    with pytest.raises(InputError, match=r"bfloat16 needs a GPU that computes in it, got Tesla V100.* Set precision"):
        check(config(gpus_per_trial=None), V100)
    check(config(gpus_per_trial=None), V100, RTX)
    check(config(gpus_per_trial=None, protocol=Protocol(precision="float32")), V100, dims=TINY)


def test_what_the_largest_card_cannot_hold_is_refused() -> None:
    with pytest.raises(TooLargeError, match=r"tiny on NVIDIA H100 80GB HBM3: .* needs 12\d\.\d GB"):
        check(config(gpus_per_trial=None), RTX, H100, mode="masked-finetuning")
    with pytest.raises(TooLargeError, match=r"has 17\.1 GB, 0\.2 of a card of 85\.5\. Raise --gpus-per-trial"):
        check(config(gpus_per_trial=0.2), RTX, H100, mode="sparse-to-sparse")
    check(config(gpus_per_trial=0.25), RTX, H100, mode="sparse-to-sparse")


MIXED: list[dict[str, float]] = [
    {"CPU": 8, "GPU": 1, "accelerator_type:H100": 1},
    {"CPU": 8, "GPU": 3, "accelerator_type:L4": 1},
]
SHARING = config(gpus_per_trial=None)


def test_whole_blocks_go_to_one_kind_of_card_by_how_many_there_are() -> None:
    tasks = [f"task{n}" for n in range(8)]
    runs = [make_run(make_cell(task=task, seed=seed)) for task in tasks for seed in (0, 1)]
    found = block_kinds(SHARING, runs, {"tiny": TINY}, MIXED, {})
    assert Counter(found.values()) == {"L4": 6, "H100": 2}
    assert block_kinds(SHARING, runs, {"tiny": TINY}, MIXED[:1], {}) == {}, "one kind: nothing to keep apart"
    assert block_kinds(config(), runs, {"tiny": TINY}, MIXED, {}) == {}, "trials on CPUs"


def test_a_block_stays_where_its_first_runs_were_and_goes_where_it_fits() -> None:
    runs = [make_run(make_cell(task=task)) for task in ("boolq", "gsm8k")]
    before = {("tiny", "boolq"): "NVIDIA H100 80GB HBM3", ("tiny", "gsm8k"): "NVIDIA H100 80GB HBM3"}
    assert set(block_kinds(SHARING, runs, {"tiny": TINY}, MIXED, before).values()) == {"H100"}
    large = replace(LLAMA_7B, num_layers=60)
    assert set(block_kinds(SHARING, runs, {"tiny": large}, MIXED, {}).values()) == {"H100"}


def test_a_trial_asks_ray_for_its_kind_and_waits_with_its_like() -> None:
    placement = Placement(SHARING, lambda: MIXED)
    run = make_run()
    assert placement.queue(run) == "torch"
    placement.keep_on({("tiny", "boolq"): "L4"})
    assert placement.resources(run) == {"CPU": 1, "GPU": 1, "accelerator_type:L4": 0.001}
    assert (placement.queue(run), placement.queue(make_run(make_cell(task="gsm8k")))) == ("torch L4", "torch")
    placement.check_placeable([run])


def test_a_run_of_cerebras_needs_no_gpu() -> None:
    run = make_run(make_cell(backend="cerebras"), cerebras={"target": "csx", "release": "2.10.0"})
    check_devices(config(), [run], {"tiny": LLAMA_7B}, [H100])


def test_every_card_has_room_for_a_small_model() -> None:
    for card in CARDS.values():
        assert budgets_for(card.memory_bytes, 1.0, CellMemory(TINY, "sparse-to-sparse", "sparsegpt", Protocol()))
