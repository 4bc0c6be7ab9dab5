"""Throughput by batch size is measured on real steps, and memory that does not suffice is reported, not guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_run

from trainables import throughput
from trainables.throughput import TIMED_STEPS, Throughput, measure
from trainables.worker import WorkerCache
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, OK
from tune_sparse.training.loop import fit


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        ("sparse-to-dense", "unstructured"),
        ("sparse-to-sparse", "unstructured"),
        ("sparse-to-sparse", "structured"),
        ("masked-finetuning", "unstructured"),
    ],
)
def test_rates_and_memory_of_every_batch_size(mode: str, method: str, llama: Path) -> None:
    worker = WorkerCache()
    for size in (1, 3):
        found = measure(tiny_run(llama, mode=mode, method=method), worker, size)
        assert found.batch_size == size
        assert found.train_examples_per_second > 0
        assert found.train_tokens_per_second > 10 * found.train_examples_per_second
        assert found.peak_memory_bytes > 10_000_000
    assert worker.loads == 1


def test_as_many_steps_are_timed_as_it_says(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        for step in fit(*arguments, **keywords):
            steps.append(step)
            yield step

    monkeypatch.setattr(throughput, "fit", counted)
    found = measure(tiny_run(llama), WorkerCache(), 2)
    timed = steps[-TIMED_STEPS:]
    assert len(steps) == throughput.WARM_UP_STEPS + TIMED_STEPS
    assert found.train_examples_per_second == pytest.approx(2 * TIMED_STEPS / sum(step.seconds for step in timed))


def test_too_little_memory_is_recorded_as_such(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    worker = WorkerCache()
    with monkeypatch.context() as patched:
        patched.setattr(throughput, "fit", out_of_memory)
        assert measure(tiny_run(llama), worker, 4) == Throughput(4, None, None, None)
    assert measure(tiny_run(llama), worker, 1).train_examples_per_second > 0


def test_the_command_prints_and_keeps_what_it_measured(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = ["--models", str(llama), "--tasks", "boolq", "--methods", "random", "--sparsities", "0.5"]
    cell += ["--modes", "sparse-to-sparse", "--data-dir", "synthetic", "--results-dir", str(tmp_path / "results")]
    assert main(["throughput", *cell, "--batch-sizes", "1", "2"]) == OK
    [path] = (tmp_path / "results" / "throughput").iterdir()
    kept = json.loads(path.read_text())
    assert [row["batch_size"] for row in kept["by_batch_size"]] == [1, 2]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3] == kept["run_id"] == path.stem
    assert [float(line.split()[1]) for line in printed[-2:]] == [
        round(row["train_examples_per_second"], 1) for row in kept["by_batch_size"]
    ]
    assert main(["throughput", *cell, "--batch-sizes", "1", "--json"]) == OK
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"] == kept["run_id"]
    assert main(["throughput", *cell, "--batch-sizes", "0"]) == BAD_INPUT
    assert "a batch size must be at least 1, got 0." in capsys.readouterr().err
