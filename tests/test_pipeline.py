"""Cells through the whole pipeline: their records, and what a worker keeps between them."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run, write_boolq
from plain_masks import make_masks
from safetensors.torch import load_file
from torch import Tensor

from trainables import loaded, pipeline, pruning_stage, training
from trainables.lora_finetuning import LoraFinetuning
from trainables.mode import MergeReport
from trainables.pipeline import run_cell
from trainables.pruning_stage import Pruned, Pruner
from trainables.rebuild import deployed_by
from trainables.worker import WorkerCache
from tune_sparse.config import SweepConfig
from tune_sparse.evaluation.outcomes import read_outcomes
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights
from tune_sparse.modes import MODES
from tune_sparse.pruning.masks import mask_sha256
from tune_sparse.sweep.plan import make_plan

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(llama: Path) -> MakeRun:
    return partial(tiny_run, llama)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[Run], Record]:
    """What a worker that has done nothing before records."""
    return lambda run: finished(run, Ledger(tmp_path / "fresh"), WorkerCache())


@pytest.mark.parametrize("mode", MODES)
def test_a_run_leaves_its_record_and_every_file(mode: str, make_run: MakeRun, ledger: Ledger) -> None:
    run = make_run(mode=mode, sparsity=0.0 if mode == "dense" else 0.5, method="none" if mode == "dense" else "random")
    record = finished(run, ledger, WorkerCache())
    assert (record.status, record.error) == ("done", None)
    assert ledger.record(run.run_id) == record
    assert ledger.run(run.run_id) == run
    folder = ledger.run_folder(run.run_id)
    expected = {"config.yaml", "sparse_config.json", "result.json", "validation_report.json", "train.log"}
    kept = "weights" if mode == "masked-finetuning" else "adapter"
    expected |= {"metrics.jsonl", "git_sha.txt", "examples.parquet", kept}
    if mode == "sparse-to-dense":
        expected.add("examples_before_merge.parquet")
    if mode == "masked-finetuning":
        expected.add("dynamics.jsonl")
    assert {path.name for path in folder.iterdir()} == expected
    assert (record.metrics["accuracy_before_merge"] is not None) == (mode == "sparse-to-dense")
    assert record.metrics["actual_sparsity"] == pytest.approx(run.cell.sparsity, abs=0.001)
    assert record.metrics["n_examples"] == len(read_outcomes(folder / "examples.parquet")) == 8
    validation = json.loads((folder / "validation_report.json").read_text())
    assert validation["all_valid"]
    marker = json.loads((folder / kept / "tune_sparse.json").read_text())
    assert (marker["mode"], marker["mask_sha256"]) == (mode, record.metrics["mask_sha256"])
    assert validation["mask_sha256"] == marker["mask_sha256"]


def test_the_modes_of_one_mask_share_the_accuracy_before_tuning(make_run: MakeRun, ledger: Ledger) -> None:
    worker = WorkerCache()
    records = [finished(make_run(mode=mode), ledger, worker) for mode in ("sparse-to-dense", "sparse-to-sparse")]
    assert len(list((ledger.folder / "pruned_baselines").glob("*.json"))) == 1
    assert len({record.metrics["accuracy_before_tuning"] for record in records}) == 1
    assert len({record.metrics["mask_sha256"] for record in records}) == 1
    assert records[0].metrics["eval_loss"] != records[1].metrics["eval_loss"]


def test_a_worker_loads_a_model_once_for_several_runs(make_run: MakeRun, ledger: Ledger) -> None:
    worker = WorkerCache()
    for changes in ({}, {"mode": "sparse-to-dense"}, {"method": "structured"}, {"task": "gsm8k"}):
        assert finished(make_run(**changes), ledger, worker).status == "done"
    assert worker.loads == 1
    assert finished(make_run(precision="bfloat16"), ledger, worker).status == "done"
    assert worker.loads == 2


def test_a_worker_gives_the_weights_of_the_checkpoint_after_every_run(
    make_run: MakeRun, ledger: Ledger, llama: Path
) -> None:
    worker = WorkerCache()
    checkpoint = load_model(llama, torch.float32, torch.device("cpu")).state_dict()
    for mode in ("sparse-to-dense", "sparse-to-sparse"):
        run = make_run(mode=mode)
        finished(run, ledger, worker)
        weights = worker.model(run).model.state_dict()
        assert list(weights) == list(checkpoint)
        assert all(torch.equal(weights[name], checkpoint[name]) for name in checkpoint)


def test_a_worker_encodes_the_examples_of_a_task_once(
    make_run: MakeRun, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode_test = loaded.encode_test
    monkeypatch.setattr(loaded, "encode_test", lambda *args: encoded.append(args[1].name) or encode_test(*args))
    worker = WorkerCache()
    for task in ("boolq", "gsm8k", "boolq"):
        for mode in ("sparse-to-dense", "sparse-to-sparse"):
            finished(make_run(task=task, mode=mode), ledger, worker)
    assert encoded == ["boolq", "gsm8k"]
    finished(make_run(n_train=15), ledger, worker)
    assert encoded == ["boolq", "gsm8k", "boolq"]


def test_a_run_does_not_depend_on_the_runs_before_it(
    make_run: MakeRun, ledger: Ledger, fresh: Callable[[Run], Record]
) -> None:
    worker, run = WorkerCache(), make_run()
    finished(make_run(mode="sparse-to-dense", method="structured"), ledger, worker)
    assert finished(run, ledger, worker).metrics == fresh(run).metrics


def test_a_diverging_run_is_recorded_as_failed_and_its_model_forgotten(
    make_run: MakeRun, ledger: Ledger, fresh: Callable[[Run], Record]
) -> None:
    worker, run = WorkerCache(), make_run()
    diverging = make_run(learning_rate=1e30)
    record = finished(diverging, ledger, worker)
    assert record.status == "failed"
    assert record.error["class"] == "RunError"
    assert "got nan at step 2" in record.error["message"]
    assert not record.error["retryable"]
    assert ledger.record(diverging.run_id) == record
    assert finished(run, ledger, worker).metrics == fresh(run).metrics
    assert worker.loads == 2


def test_an_infrastructure_error_is_raised_and_leaves_nothing(
    make_run: MakeRun, ledger: Ledger, fresh: Callable[[Run], Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> Iterator[Any]:
        raise MemoryError("no room")
        yield

    worker, run = WorkerCache(), make_run()
    with monkeypatch.context() as patched:
        patched.setattr(training, "fit", out_of_memory)
        with pytest.raises(MemoryError, match="no room"):
            finished(run, ledger, worker)
    gc.collect()
    assert list((ledger.folder / "runs").iterdir()) == []
    assert finished(run, ledger, worker).metrics == fresh(run).metrics
    assert worker.loads == 2


def test_a_run_that_is_closed_leaves_the_worker_as_new(
    make_run: MakeRun, ledger: Ledger, fresh: Callable[[Run], Record]
) -> None:
    worker, run = WorkerCache(), make_run()
    steps = run_cell(make_run(mode="sparse-to-dense"), ledger, worker)
    next(steps)
    steps.close()
    gc.collect()
    assert list((ledger.folder / "runs").iterdir()) == []
    assert finished(run, ledger, worker).metrics == fresh(run).metrics


def test_a_forgotten_model_is_freed(make_run: MakeRun) -> None:
    worker = WorkerCache()
    model = weakref.ref(worker.model(make_run()).model)
    worker.clear()
    assert model() is None


def test_a_run_without_its_last_mask_fails_its_validation(
    make_run: MakeRun, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "mask_weights_into", lambda model, masks: None)
    record = finished(make_run(mode="sparse-to-dense"), ledger, WorkerCache())
    assert record.status == "failed"
    assert "a run must pass its validation: " in record.error["message"]
    assert "model.layers.0.self_attn.q_proj.weight: masked weights must be 0, got " in record.error["message"]


def test_a_merge_that_changes_the_function_fails_its_validation(
    make_run: MakeRun, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_into_model = LoraFinetuning.merge_into_model

    def rounded(lora: LoraFinetuning, pruned: Mapping[str, Tensor]) -> MergeReport:
        report = merge_into_model(lora, pruned)
        for weight in prunable_weights(lora.model).values():
            weight.copy_(weight.bfloat16())
        return report

    monkeypatch.setattr(LoraFinetuning, "merge_into_model", rounded)
    record = finished(make_run(), ledger, WorkerCache())
    assert record.status == "failed"
    assert record.error["message"].endswith("the merged model must compute exactly the trained function")


def test_the_recorded_mask_is_that_of_the_method(make_run: MakeRun, ledger: Ledger, llama: Path) -> None:
    record = finished(make_run(), ledger, WorkerCache())
    weights = prunable_weights(load_model(llama, torch.float32, torch.device("cpu")))
    masks = make_masks("unstructured", weights, check_checkpoint(str(llama)).dims, 0.5, seed=0)
    assert record.metrics["mask_sha256"] == mask_sha256(masks)


@pytest.mark.parametrize(
    ("method", "order"),
    [
        *((method, order) for method in ("wanda", "sparsegpt", "wanda-owl") for order in ("dense", "sequential")),
        ("taylor-2:4", "dense"),
        ("random-structured", "dense"),
    ],
)
def test_every_kind_of_method_trains(method: str, order: str, make_run: MakeRun, ledger: Ledger) -> None:
    run = make_run(method=method, calibration_order=order)
    record = finished(run, ledger, WorkerCache())
    assert record.status == "done", record.error
    assert record.metrics["actual_sparsity"] == pytest.approx(0.5, abs=0.01)
    described = json.loads((ledger.run_folder(run.run_id) / "sparse_config.json").read_text())
    calibration = {
        "calibration": "task",
        "calibration_tokens": 144,
        "calibration_window": 24,
        "calibration_order": order,
        "calibration_tokens_seen": 144,
    }
    assert described["calibration"] == (calibration if run.is_calibrated else None)
    assert described["mask_sha256"] == record.metrics["mask_sha256"]
    shown = {"calibration": "task", "calibration_order": order, "calibration_tokens_seen": 144}
    recorded = {name: value for name, value in record.metrics.items() if name in shown}
    assert recorded == (shown if run.is_calibrated else {})
    if run.is_calibrated:
        assert record.metrics["calibration_tokens_per_input"] == 144 / 192, "of the feed-forward channels"
    log = (ledger.run_folder(run.run_id) / "train.log").read_text()
    assert ("calibrated on 144 tokens, a warning: that is 0.75 for each input" in log) == (method == "sparsegpt")


def test_sparsegpt_freezes_the_weights_that_it_updated(
    make_run: MakeRun, ledger: Ledger, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: dict[str, Tensor] = {}
    prune_into = Pruner.prune_into

    def kept(pruner: Pruner, *args: Any) -> Pruned:
        pruned = prune_into(pruner, *args)
        frozen.update((name, pruned.weights[name].clone()) for name in pruned.weights)
        return pruned

    monkeypatch.setattr(Pruner, "prune_into", kept)
    run = make_run(method="sparsegpt", steps=1, learning_rate=1e-30, final_learning_rate=1e-30)
    worker = WorkerCache()
    finished(run, ledger, worker)
    dense = prunable_weights(load_model(llama, torch.float32, torch.device("cpu")))
    for name, weight in frozen.items():
        kept_weights = weight != 0
        assert not torch.equal(weight[kept_weights], dense[name][kept_weights])
    deployed, _ = deployed_by(run, ledger, worker)
    for name, merged in prunable_weights(deployed.model).items():
        torch.testing.assert_close(merged, frozen[name], atol=1e-6, rtol=0)


def test_the_modes_of_a_pair_begin_alike_and_another_cell_of_the_seed_does_not(
    make_run: MakeRun, ledger: Ledger
) -> None:
    """A step so small that the adapter that is saved is the one that it began with."""
    one_step = {"steps": 1, "learning_rate": 1e-30, "final_learning_rate": 1e-30}
    cells = [{"mode": "sparse-to-dense"}, {"mode": "sparse-to-sparse"}, {"sparsity": 0.5001}]
    runs = [make_run(**one_step, **cell) for cell in cells]
    records = [finished(run, ledger) for run in runs]
    losses = [record.metrics["train_loss"] for record in records]
    first, second, other = (first_factors(ledger, run) for run in runs)
    assert all(torch.equal(A, second[name]) for name, A in first.items())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "on the same examples"
    assert not any(torch.equal(A, other[name]) for name, A in first.items())


def first_factors(ledger: Ledger, run: Run) -> dict[str, Tensor]:
    saved = load_file(ledger.run_folder(run.run_id) / "adapter" / "adapter_model.safetensors")
    return {name: tensor for name, tensor in saved.items() if "lora_A" in name}


def test_a_record_names_what_else_decides_its_last_bits(make_run: MakeRun, ledger: Ledger) -> None:
    record = finished(make_run(steps=1), ledger)
    assert {"accelerate", "torch", "transformers"} <= record.environment["packages"].keys()
    assert record.measured["attention_implementation"] == "sdpa"
    assert "math" in record.environment["attention"].split()


def test_a_worker_measures_a_model_on_a_task_once(
    make_run: MakeRun, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    measured = pruning_stage.measured
    monkeypatch.setattr(pruning_stage, "measured", lambda *args: walks.append(1) or measured(*args))
    worker = WorkerCache()
    for sparsity in (0.3, 0.5):
        for mode in ("sparse-to-dense", "sparse-to-sparse"):
            finished(make_run(method="wanda", sparsity=sparsity, mode=mode), ledger, worker)
    assert len(walks) == 1
    finished(make_run(method="wanda", task="gsm8k"), ledger, worker)
    assert len(walks) == 2


def test_a_calibrated_run_does_not_depend_on_the_runs_before_it(
    make_run: MakeRun, ledger: Ledger, fresh: Callable[[Run], Record]
) -> None:
    worker, run = WorkerCache(), make_run(method="sparsegpt", calibration_order="sequential")
    finished(make_run(method="taylor"), ledger, worker)
    finished(make_run(method="wanda", calibration_order="sequential"), ledger, worker)
    assert finished(run, ledger, worker).metrics == fresh(run).metrics


def test_scores_can_be_calibrated_on_text(llama: Path, ledger: Ledger, tmp_path: Path) -> None:
    data_dir = write_boolq(tmp_path / "data", train=20, validation=6)
    text = data_dir / "wikitext2" / "train.txt"
    text.parent.mkdir()
    text.write_text("The tower was built in 1889 and is 330 metres tall . " * 60)
    few = {
        "steps": 1,
        "warmup_steps": 0,
        "global_batch_size": 4,
        "n_selection": 4,
        "precision": "float32",
    }
    calibration = {"calibration": "wikitext2", "calibration_tokens": 256, "calibration_window": 64}
    names = {"models": str(llama), "tasks": "boolq", "data_dir": data_dir, "methods": "wanda", "sparsities": "0.5"}
    plan = make_plan(SweepConfig.from_names(names | few | calibration))
    first, second = plan.runs.values()
    assert first.calibration_fingerprint == second.calibration_fingerprint is not None
    assert finished(first, ledger, WorkerCache()).status == "done"
    described = json.loads((ledger.run_folder(first.run_id) / "sparse_config.json").read_text())
    assert described["calibration"] | calibration == described["calibration"]
    assert described["calibration"]["calibration_tokens_seen"] == 256
    assert finished(second, ledger).metrics["calibration_tokens_seen"] == 256, "read from the stored pruning"
