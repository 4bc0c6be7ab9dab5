"""A run that lacked memory on a whole device is not repeated there, and is where there may be more."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from factories import failed_record, make_cell, make_run, make_sweep, tiny_run, write_run

from trainables.failures import may_pass
from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.config import BudgetOptions, SweepConfig
from tune_sparse.errors import TooLargeError, is_out_of_memory
from tune_sparse.evaluation.card_budgets import budgets_for
from tune_sparse.evaluation.memory import GIB, CellMemory
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import Checkpoint
from tune_sparse.models.dims import ModelDims
from tune_sparse.sweep.examples import Examples
from tune_sparse.sweep.plan import Plan
from tune_sparse.sweep.retries import describe_machine, has_more_memory_now, memory_lines

LLAMA_7B = ModelDims(4096, 32, 32, 32, 128, 11008, 32000, None, 4096)
ON_GPUS = SweepConfig(models=("tiny",), gpus_per_trial=1.0)


def hungry(*arguments: Any) -> Generator[None, None, Any]:
    """A training that asks torch for a petabyte."""
    yield None
    torch.empty(1 << 50, dtype=torch.uint8)


def overfull(*arguments: Any) -> Generator[None, None, Any]:
    """A training that a GPU has too little memory for, which this machine has not."""
    yield None
    raise torch.OutOfMemoryError("CUDA out of memory")


def train(stage: Any, run: Run, ledger: Ledger, **held: float) -> Record:
    steps = run_cell(run, ledger, WorkerCache(), stage, held)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def test_out_of_memory_on_a_whole_gpu_is_recorded_for_good(llama: Path, tmp_path: Path) -> None:
    record = train(overfull, tiny_run(llama), Ledger(tmp_path), CPU=1.0, GPU=1.0)
    assert record.status == "failed"
    assert record.error is not None
    assert is_out_of_memory(record.error)
    assert not record.error["retryable"]
    assert record.error["device_memory_bytes"] == psutil.virtual_memory().total, "there is no GPU here"
    assert record.error["budgets"]["micro_batch_tokens"] == 2048
    assert record.error["version"] == describe_machine()["version"]


@pytest.mark.parametrize(("stage", "gpus"), [(overfull, 0.5), (hungry, 0.5), (hungry, 1.0)])
def test_out_of_memory_on_a_share_or_of_the_machine_is_raised_and_tried_again(
    llama: Path, tmp_path: Path, stage: Any, gpus: float
) -> None:
    ledger, run = Ledger(tmp_path), tiny_run(llama)
    with pytest.raises(RuntimeError, match=r"DefaultCPUAllocator|CUDA out of memory"):
        train(stage, run, ledger, CPU=1.0, GPU=gpus)
    assert ledger.record(run.run_id) is None


def test_a_whole_gpu_does_not_forgive_what_may_pass() -> None:
    whole = {"GPU": 1.0}
    assert may_pass(ConnectionError("reset"), whole)
    assert not may_pass(torch.OutOfMemoryError("CUDA out of memory"), whole)
    assert not may_pass(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), whole)
    assert may_pass(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), {"GPU": 0.5})
    assert not may_pass(TooLargeError("a device must hold a cell"), {"GPU": 0.5}), "it is refused again"


def lacking(run: Run, device_bytes: float | None, **changes: Any) -> Record:
    record = failed_record(run, "CUDA out of memory")
    place = {"device_memory_bytes": device_bytes, "version": describe_machine()["version"], "budgets": None}
    return replace(record, error=(record.error or {}) | place | changes)


@pytest.fixture
def card_24(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine whose driver says that it has one GPU of 24 GB; returns its memory."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0, GPU-aa, NVIDIA GeForce RTX 4090, 24564, 8.9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return 24564 << 20


def why(record: Record, run: Run, config: SweepConfig = ON_GPUS) -> str | None:
    return has_more_memory_now(record, run, config, LLAMA_7B)


def test_only_more_memory_or_a_new_version_is_a_reason(card_24: int) -> None:
    run = make_run()
    assert why(lacking(run, card_24), run) is None
    assert why(lacking(run, 80 * GIB), run) is None
    assert why(lacking(run, card_24 / 2), run) == "a larger device"
    assert why(lacking(run, card_24, version="of yesterday"), run) == "a new version"
    of_machine = {"class": "OutOfMemoryError", "message": "Task was killed due to the node running low on memory."}
    total = psutil.virtual_memory().total
    assert why(lacking(run, total, **of_machine), run) is None, "whatever GPUs there are"
    assert why(lacking(run, total / 2, **of_machine), run) == "a larger device"
    assert why(lacking(run, None), run) is None, "a node of a cluster did not say how much it had"


def test_smaller_budgets_are_a_reason(card_24: int) -> None:
    run = make_run()
    then = budgets_for(card_24, 1.0, CellMemory(LLAMA_7B, run.cell.mode, run.cell.method, run.protocol)).as_record()
    record = lacking(run, card_24, budgets=then)
    assert why(record, run) is None
    smaller = replace(ON_GPUS, budgets=BudgetOptions(micro_batch_tokens=2048))
    assert why(record, run, smaller) == "smaller budgets"
    larger = replace(ON_GPUS, budgets=BudgetOptions(generation_tokens=then["generation_tokens"] + 512))
    assert why(record, run, larger) is None


def test_a_plan_leaves_what_lacked_memory_and_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    small, large, broken = (make_run(make_cell(seed=seed)) for seed in range(3))
    total = psutil.virtual_memory().total
    write_run(ledger, small, lacking(small, total))
    write_run(ledger, large, lacking(large, total // 2))
    write_run(ledger, broken, failed_record(broken))
    runs = {run.run_id: run for run in (small, large, broken)}
    checkpoints = {"tiny": Checkpoint("tiny", tmp_path, "m", LLAMA_7B)}
    plan = Plan(SweepConfig(models=("tiny",)), make_sweep([]), runs, checkpoints, Examples(None, {}, {}, None))
    assert plan.missing(ledger) == [large]
    assert plan.missing(ledger, retry_failed=True) == [small, large, broken]
    left, again = memory_lines(plan.lacked_memory(ledger))
    assert f"on a device of {total / 1e9:.1f} GB, and is left as failed: only a larger device, smaller" in left
    assert "is tried again: there is a larger device" in again
