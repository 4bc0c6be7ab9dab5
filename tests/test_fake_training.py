"""A 7B fits: the peak of a training step in true shapes, by fake tensors.

Every block adds the same bytes, so that two depths give all others exactly; a slow test builds all 32 blocks.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
from fake_training import FakeStep, make_config

from tune_sparse.config import Protocol
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.models.dims import ModelDims
from tune_sparse.training.budgets import CPU_BUDGETS

pytestmark = pytest.mark.xdist_group("simulated device")
LAYERS = 32
LIMIT_GB = {True: 22, False: 75}
"""By activation checkpointing: a 24 GB card, an 80 GB card."""


def peak_bytes(process: ProcessPoolExecutor, step: FakeStep) -> int:
    two, three = (process.submit(replace(step, layers=layers).peak_bytes).result() for layers in (2, 3))
    return two + (step.layers - 2) * (three - two)


def forecast_bytes(model: str, is_masked: bool, checkpointing: bool) -> int:
    """By the formula. A cell's masks as bits are no part of a step, which knows them by the zeros of the weights."""
    mode = "sparse-to-sparse" if is_masked else "sparse-to-dense"
    cell = CellMemory(ModelDims.from_config(make_config(model, LAYERS)), mode, "unstructured", Protocol())
    budgets = replace(CPU_BUDGETS, micro_batch_tokens=8192, activation_checkpointing=checkpointing)
    return cell.stages(budgets)["train"] - cell.masks


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all activations"])
@pytest.mark.parametrize(
    ("model", "is_masked"),
    [("Llama-2-7B", True), ("Llama-2-7B", False), ("Mistral-7B", True)],
    ids=["sparse-to-sparse", "plain LoRA", "grouped queries"],
)
def test_a_step_of_8192_tokens_fits(
    model: str, is_masked: bool, checkpointing: bool, device_process: ProcessPoolExecutor
) -> None:
    peak = peak_bytes(device_process, FakeStep(model, LAYERS, is_masked, checkpointing))
    assert peak / 1e9 <= LIMIT_GB[checkpointing]
    print(model, is_masked, checkpointing, peak / 1e9, forecast_bytes(model, is_masked, checkpointing) / peak)
    assert forecast_bytes(model, is_masked, checkpointing) == pytest.approx(peak, rel=0.1)


def test_every_block_adds_the_same_bytes(device_process: ProcessPoolExecutor) -> None:
    step = FakeStep("Llama-2-7B", 5, True, activation_checkpointing=True)
    assert peak_bytes(device_process, step) == device_process.submit(step.peak_bytes).result()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_all_blocks_of_a_7b_take_what_two_depths_say(checkpointing: bool, device_process: ProcessPoolExecutor) -> None:
    step = FakeStep("Llama-2-7B", LAYERS, True, checkpointing)
    assert peak_bytes(device_process, step) == device_process.submit(step.peak_bytes).result()
