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
from tune_sparse.cerebras.appliance import results_label
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, OK
from tune_sparse.identity import hash_json
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


def test_a_card_that_can_hold_no_training_is_a_row_with_its_reason(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.budgets.gpu_memory_bytes", lambda: 1 << 28)
    monkeypatch.setattr("trainables.budgets.gpu_share", lambda: 1.0)
    found = measure(tiny_run(llama), WorkerCache(), 2)
    assert found.train_examples_per_second is None
    assert found.problem is not None
    assert "a device must hold a cell" in found.problem


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
    assert kept["measured_on"] == {"backend": "torch"}
    assert printed[-3] == kept["run_id"] == path.stem
    assert [float(line.split()[1]) for line in printed[-2:]] == [
        round(row["train_examples_per_second"], 1) for row in kept["by_batch_size"]
    ]
    assert main(["throughput", *cell, "--batch-sizes", "1", "--json"]) == OK
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"] == kept["run_id"]
    assert main(["throughput", *cell, "--batch-sizes", "0"]) == BAD_INPUT
    assert "a batch size must be at least 1, got 0." in capsys.readouterr().err


CELL = ("--tasks", "boolq", "--methods", "random", "--sparsities", "0.5", "--modes", "sparse-to-dense")


def asked(llama: Path, results: Path, *more: str) -> list[str]:
    data = ("--data-dir", "synthetic", "--results-dir", str(results), "--set", "n_train=16", "n_test=4")
    return ["throughput", "--models", str(llama), *CELL, *data, "--backend", "cerebras", "--json", *more]


def kept(results: Path) -> dict[str, Any]:
    [path] = (results / "throughput").glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def torch_never_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a rate of the backend cerebras must not be measured with torch")

    monkeypatch.setattr(throughput, "fit", refused)


@pytest.fixture
def cluster(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tune_sparse.cerebras.environment.CLUSTER_CONFIG", site)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return site


def test_a_rate_of_cerebras_is_measured_on_the_target_that_was_asked(
    llama: Path, site: Path, tmp_path: Path, torch_never_trains: None
) -> None:
    from stand_in_cerebras import STEP_SECONDS

    assert main(asked(llama, tmp_path, "--cerebras-target", "cpu", "--batch-sizes", "2", "4")) == OK
    found = kept(tmp_path)
    assert found["measured_on"] == {"backend": "cerebras", "target": "cpu", "release": "2.10.0"}
    for row in found["by_batch_size"]:
        assert 0 < row["train_examples_per_second"] <= row["batch_size"] / STEP_SECONDS
        assert row["compiler_estimate_examples_per_second"] is None


def test_on_a_wafer_queue_and_compile_are_no_part_of_the_rate_and_the_estimate_stands_apart(
    llama: Path, cluster: Path, tmp_path: Path, torch_never_trains: None
) -> None:
    assert main(asked(llama, tmp_path, "--batch-sizes", "4")) == OK
    [row] = kept(tmp_path)["by_batch_size"]
    assert row["compiler_estimate_examples_per_second"] == 34.1
    assert row["train_examples_per_second"] not in (None, 34.1)
    assert row["peak_memory_bytes"] is None
    [folder] = (tmp_path / "throughput" / "jobs").iterdir()
    labels = json.loads((folder / "job.json").read_text())["cluster"]["job_labels"]
    guarded = json.loads((folder / "guard.json").read_text())["label"]
    assert guarded == labels[0], "what is cancelled are its own jobs, not those of a sweep of the same folder"
    assert [label.partition("=")[0] for label in labels] == ["tune_sparse_run", "tune_sparse", "name"]
    assert results_label(hash_json(str(tmp_path.resolve()))) not in labels, "the start of a sweep cancels that one's"


def test_an_estimate_without_training_is_never_a_rate(
    llama: Path, cluster: Path, tmp_path: Path, torch_never_trains: None
) -> None:
    assert main(asked(llama, tmp_path, "--batch-sizes", "4", "--compile-only")) == OK
    [row] = kept(tmp_path)["by_batch_size"]
    assert row["compiler_estimate_examples_per_second"] == 34.1
    assert (row["train_examples_per_second"], row["train_tokens_per_second"]) == (None, None)


def test_what_cannot_be_measured_is_refused_or_says_why(
    llama: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        (("--cerebras-target", "validate"), "a rate needs a target that trains, validate trains nothing"),
        (("--cerebras-target", "csx"), "this machine knows none"),
        (("--cerebras-target", "cpu", "--compile-only"), "only the compiler of a CS-3 makes an estimate"),
        (("--backend", "torch", "--compile-only"), "only the backend cerebras compiles"),
    ):
        assert main(asked(llama, tmp_path, *more)) == BAD_INPUT
        assert message in capsys.readouterr().err
    assert not (tmp_path / "throughput").exists()
    (site / "fault").write_text("unavailable")
    assert main(asked(llama, tmp_path, "--cerebras-target", "cpu", "--batch-sizes", "4")) == OK
    [row] = kept(tmp_path)["by_batch_size"]
    assert row["train_examples_per_second"] is None
    assert "the appliance was unavailable" in row["problem"]
