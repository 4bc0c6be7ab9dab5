"""The bytes of live tensors over a whole cell, stage by stage: one copy of the weights, and little beside it."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Once
from factories import finished, tiny_run, write_llama
from live_bytes import LiveBytes

from trainables import pipeline
from trainables.worker import WorkerCache
from tune_sparse.config import BudgetOptions, ScheduleSettings
from tune_sparse.evaluation.memory import MASK_UPDATE_BYTES, CellMemory
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import check_checkpoint
from tune_sparse.modes import SPARSE_ADAPTER_MODES
from tune_sparse.training.budgets import Budgets

MOST = 1.6
"""times the bytes of all parameters; activations, adapters and optimizer are a large part of so small a model"""
STAGES = ["load", "prune", "score before tuning", "set up", "train", "merge", "score"]
TEXT_TOKENS = 512
FEW: dict[str, Any] = {
    "precision": "bfloat16",
    "steps": 1,
    "eval_every": 1,
    "global_batch_size": 2,
    "lora_rank": 4,
    "n_train": 2,
    "n_selection": 1,
    "n_test": 1,
    "calibration_tokens": TEXT_TOKENS,
}


def peaks_of_a_cell(run: Run, results: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], Budgets]:
    """{stage: its peak of live bytes}, and the budgets of the cell."""
    gc.collect()
    peaks: dict[str, int] = {}
    with LiveBytes() as live:

        def end(memory: pipeline.PeakMemory, stage: str) -> None:
            peaks[stage] = live.peak
            live.restart()

        monkeypatch.setattr(pipeline.PeakMemory, "end", end)
        record = finished(run, Ledger(results), WorkerCache())
    assert record.status == "done", record.error
    return peaks, Budgets.from_record(record.measured["budgets"])


def formula(run: Run, model: Path) -> CellMemory:
    cell = run.cell
    return CellMemory(check_checkpoint(str(model)).dims, cell.mode, cell.method, run.protocol, cell.sparsity)


@pytest.fixture(scope="session")
def narrow_llama(llama: Path, once: Once) -> Path:
    """As `wide_llama`, 512 wide with 4 layers."""
    return once("narrow-llama", lambda folder: write_llama(folder, llama, 512, 4, 1408, 8))


@pytest.mark.parametrize(("mode", "method"), [("sparse-to-dense", "wanda"), ("sparse-to-sparse", "unstructured")])
def test_every_stage_of_a_cell_has_one_copy_of_the_weights(
    mode: str, method: str, narrow_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(narrow_llama, **FEW, mode=mode, method=method)
    peaks, _ = peaks_of_a_cell(run, tmp_path, monkeypatch)
    assert list(peaks) == STAGES
    assert max(peaks.values()) <= MOST * formula(run, narrow_llama).weights, peaks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "settings"), [("rigl", {}), ("set", {}), ("gradual", {}), ("gradual", {"revivable": True})]
)
def test_a_schedule_holds_no_second_copy_of_what_is_trained(
    schedule: str, settings: dict[str, Any], narrow_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = FEW | {"steps": 4, "precision": "float32"}
    run = tiny_run(narrow_llama, **few, mode="masked-finetuning", schedule=schedule)
    run = replace(run, schedule_settings=ScheduleSettings(update_every=1, gradual_updates=2, **settings))
    assert len(run.updates) >= 2
    peaks, budgets = peaks_of_a_cell(run, tmp_path, monkeypatch)
    cell = formula(run, narrow_llama)
    assert peaks["train"] <= cell.stages(budgets)["train"]
    largest = cell.largest * MASK_UPDATE_BYTES  # a tenth of so small a model
    others = cell.weights - 4 * cell.prunable
    assert peaks["train"] <= 1.05 * (16 * cell.prunable + cell.masks) + others + largest


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unstructured", "structured", "wanda", "sparsegpt"])
@pytest.mark.parametrize("mode", SPARSE_ADAPTER_MODES)
def test_every_kind_of_cell_has_one_copy_of_the_weights(
    mode: str, method: str, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(wide_llama, **FEW, mode=mode, method=method)
    peaks, _ = peaks_of_a_cell(run, tmp_path, monkeypatch)
    assert max(peaks.values()) <= MOST * formula(run, wide_llama).weights, peaks


@pytest.mark.slow
def test_the_formula_is_what_lives_but_for_a_tenth(
    wide_llama: Path, real_examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text, whose tokens all count and whose windows fill the budgets."""
    settings = FEW | {"max_tokens": TEXT_TOKENS, "lora_rank": 16}
    run = tiny_run(wide_llama, real_examples, **settings, task="wikitext2")
    run = replace(run, budgets=BudgetOptions(TEXT_TOKENS, TEXT_TOKENS, TEXT_TOKENS))
    peaks, budgets = peaks_of_a_cell(run, tmp_path, monkeypatch)
    forecast = formula(run, wide_llama).stages(budgets)
    assert {stage: peaks[stage] / forecast[stage] for stage in forecast if stage in peaks} == {
        stage: pytest.approx(1, abs=0.1) for stage in ("load", "prune", "train", "merge", "score")
    }


@pytest.mark.slow
def test_recovery_takes_what_the_formula_says(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FEW | {"n_train": 64, "calibration_window": TEXT_TOKENS // 4, "recover": "reconstruct"}
    run = tiny_run(wide_llama, **settings)
    peaks, budgets = peaks_of_a_cell(run, tmp_path, monkeypatch)
    cell = formula(run, wide_llama)
    assert peaks["prune"] == pytest.approx(cell.stages(budgets)["prune"], rel=0.1)
    assert peaks["prune"] <= MOST * cell.weights
