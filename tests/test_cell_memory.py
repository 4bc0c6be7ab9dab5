"""The bytes of live tensors over a whole cell, stage by stage: one copy of the weights, and little beside it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from conftest import Once
from factories import finished, tiny_run, write_llama
from live_bytes import LiveBytes

from trainables import pipeline
from trainables.worker import WorkerCache
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.safetensors_io import TensorFiles
from tune_sparse.modes import SPARSE_ADAPTER_MODES

MOST = 1.6
"""times the bytes of all parameters; activations, adapters and optimizer are a large part of so small a model"""
STAGES = ["load", "prune", "score before tuning", "set up", "train", "merge", "score"]
FEW = {
    "precision": "bfloat16",
    "steps": 1,
    "eval_every": 1,
    "global_batch_size": 2,
    "lora_rank": 4,
    "n_train": 2,
    "n_selection": 1,
    "n_test": 1,
    "calibration_examples": 1,
}


def peaks_of_a_cell(model: Path, results: Path, monkeypatch: pytest.MonkeyPatch, **cell: str) -> dict[str, float]:
    """{stage: its peak over the bytes of the weights}"""
    run = tiny_run(model, **FEW | cell)
    gc.collect()
    peaks: dict[str, float] = {}
    weights = sum(size.numel() for size in map(torch.Size, TensorFiles([model / "model.safetensors"]).shapes.values()))
    with LiveBytes() as live:

        def end(memory: pipeline.PeakMemory, stage: str) -> None:
            peaks[stage] = live.peak / (torch.bfloat16.itemsize * weights)
            live.restart()

        monkeypatch.setattr(pipeline.PeakMemory, "end", end)
        record = finished(run, Ledger(results), WorkerCache())
    assert record.status == "done", record.error
    return peaks


@pytest.fixture(scope="session")
def narrow_llama(llama: Path, once: Once) -> Path:
    """As `wide_llama`, 512 wide with 4 layers."""
    return once("narrow-llama", lambda folder: write_llama(folder, llama, 512, 4, 1408, 8))


@pytest.mark.parametrize(("mode", "method"), [("sparse-to-dense", "wanda"), ("sparse-to-sparse", "unstructured")])
def test_every_stage_of_a_cell_has_one_copy_of_the_weights(
    mode: str, method: str, narrow_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = peaks_of_a_cell(narrow_llama, tmp_path, monkeypatch, mode=mode, method=method)
    assert list(peaks) == STAGES
    assert max(peaks.values()) <= MOST, peaks


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unstructured", "structured", "wanda", "sparsegpt"])
@pytest.mark.parametrize("mode", SPARSE_ADAPTER_MODES)
def test_every_kind_of_cell_has_one_copy_of_the_weights(
    mode: str, method: str, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = peaks_of_a_cell(wide_llama, tmp_path, monkeypatch, mode=mode, method=method)
    assert max(peaks.values()) <= MOST, peaks
