from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import done_record, make_cell, make_run, make_sweep, write_run

from tune_sparse.cli import main
from tune_sparse.config import Cell, Cerebras, SweepConfig
from tune_sparse.errors import InputError, TooLargeError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import Checkpoint
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.sweep.examples import Examples
from tune_sparse.sweep.forecast import Medians, RunCost, cost_of_run, forecast, pilots, trials_at_once
from tune_sparse.sweep.plan import Plan, checkpoint_bytes, host_bytes, make_plan
from tune_sparse.sweep.preparation import check_host, check_start, needed_bytes

FEW = {"sparsities": "0 0.5", "methods": "random", "data_dir": "synthetic", "precision": "float32", "workers": 2}
SMALL = {"n_train": 32, "n_selection": 4, "n_test": 8}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


@pytest.fixture(scope="module")
def plan(llama: Path, mistral: Path) -> Plan:
    """Of two models and two tasks: dense, sparse-to-dense and sparse-to-sparse each."""
    models = f"{llama} {mistral}"
    return make_plan(SweepConfig.from_names({"models": models, "tasks": "boolq gsm8k"} | FEW | SMALL))


def find_run(plan: Plan, model: str, task: str, mode: str) -> Run:
    [run] = (r for r in plan.runs.values() if model in r.cell.model and (r.cell.task, r.cell.mode) == (task, mode))
    return run


def measure(ledger: Ledger, run: Run, seconds: float, **measured: Any) -> None:
    record = done_record(run)
    write_run(ledger, run, replace(record, measured=record.measured | {"trial_seconds": seconds} | measured))


def cost_taking(seconds: float) -> RunCost:
    return RunCost(seconds, seconds, 0.0, 0.0, 0.0, 0.0, 10.0)


def test_without_measurements_time_is_unknown_and_disk_a_bound(plan: Plan, ledger: Ledger) -> None:
    found = forecast(plan, ledger, plan.missing(ledger))
    assert found.runs == found.bounded == 12
    assert sorted(found.unmeasured.values()) == [3, 3, 3, 3]
    assert (found.cpu_seconds, found.wall_seconds) == (0, None)
    assert found.disk_bytes == sum(plan.estimate_bytes(run) for run in plan.runs.values())


def test_a_trial_on_cerebras_takes_memory_of_its_host_too(tmp_path: Path) -> None:
    """It prunes and scores a 7B here beside a child that has it in float32; on a GPU only the child is left."""
    plan = plan_of_7b(tmp_path, make_cell(mode="sparse-to-dense", sparsity=0.5, backend="cerebras"))
    run = replace(next(iter(plan.runs.values())), cerebras={"target": "csx", "release": "2.10.0"})
    plan = replace(plan, runs={run.run_id: run})
    assert 13.5e9 + 53.9e9 < host_bytes(plan, [run]) < 80e9
    scored_there = replace(plan, config=replace(plan.config, cerebras=Cerebras(scoring_gpus=1.0)))
    assert host_bytes(scored_there, [run]) < 60e9
    assert checkpoint_bytes(plan, [run]) == 0, "its checkpoints are counted apart"


def test_each_run_takes_the_median_of_the_finest_group_that_was_measured(plan: Plan, ledger: Ledger) -> None:
    """Of one model, boolq's dense run took 10 s and its sparse-to-dense one 30 s."""
    measure(ledger, find_run(plan, "llama", "boolq", "dense"), 10.0, held={"CPU": 2.0})
    measure(ledger, find_run(plan, "llama", "boolq", "sparse-to-dense"), 30.0, held={"CPU": 2.0, "GPU": 0.5})
    found = forecast(plan, ledger, plan.missing(ledger))
    assert found.by_group == {"backend, model, task": 1, "backend, model": 3}
    assert found.cpu_seconds == 4 * 2 * 20
    assert found.gpu_seconds == 4 * (0 + 15) / 2
    assert found.wall_seconds == 4 * 20 / 2
    assert list(found.unmeasured.values()) == [3, 3], "the other model says nothing of this one"


LLAMA_7B = ModelDims(4096, 32, 32, 32, 128, 11008, 32000, None, 4096)


def plan_of_7b(tmp_path: Path, *cells: Cell) -> Plan:
    runs = {run.run_id: run for run in map(make_run, cells)}
    checkpoints = {"tiny": Checkpoint("tiny", tmp_path, "m", LLAMA_7B)}
    return Plan(
        SweepConfig(models=("tiny",), workers=2), make_sweep([]), runs, checkpoints, Examples(None, {}, {}, None)
    )


def test_stored_prunings_and_checkpoints_need_room_too(tmp_path: Path, ledger: Ledger) -> None:
    """A mask of a 7B takes 0.8 GB, SparseGPT's kept weights 6.5 GB more, float32 states of masked finetuning 78 GB."""
    modes = [make_cell(method="sparsegpt", mode=mode) for mode in ("sparse-to-dense", "sparse-to-sparse")]
    random = [
        make_cell(method="random", seed=seed, mode=mode)
        for seed in (0, 1)
        for mode in ("sparse-to-dense", "sparse-to-sparse")
    ]
    plan = plan_of_7b(tmp_path, *modes, *random, make_cell(), make_cell(task="gsm8k", method="sparsegpt"))
    found = forecast(plan, ledger, plan.missing(ledger))
    assert found.pruning_bytes == pytest.approx(4 * 0.81e9 + 2 * 6.48e9, rel=0.01), "of two tasks, of two seeds"
    ledger.write_pruning(make_run(random[0]), BitMasks.pack([("w", torch.ones(8, 8) > 0)]), None, {})
    rest = forecast(plan, ledger, plan.missing(ledger))
    assert found.pruning_bytes - rest.pruning_bytes == pytest.approx(0.81e9, rel=0.01), "one is there"
    assert found.checkpoint_bytes < 1.1e9
    assert 25e9 < found.host_bytes < 30e9, "weights, and 2,048 tokens of activations: trials compute on the CPU"
    with pytest.raises(TooLargeError, match=r"which takes up to 100000\.0 GB, it has"):
        check_host(10**14)
    tuned = plan_of_7b(tmp_path, make_cell(mode="masked-finetuning"))
    found = forecast(tuned, ledger, tuned.missing(ledger))
    assert found.checkpoint_bytes == pytest.approx(2 * (77.7e9 + 1.6e9), rel=0.01)
    assert needed_bytes(tuned, ledger, tuned.missing(ledger)) > 155e9
    assert f"up to {found.checkpoint_bytes / 1e6:.0f} MB for each unfinished training" in "\n".join(found.lines())


def test_a_sweep_that_the_gpus_of_this_machine_cannot_hold_does_not_start(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0, GPU-aa, NVIDIA GeForce RTX 4090, 24564, 8.9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan = plan_of_7b(tmp_path, make_cell(mode="masked-finetuning"))
    with pytest.raises(InputError, match=r"needs a GPU, tiny has 6\.7e9, .* Give --gpus-per-trial 1"):
        check_start(plan, ledger, plan.missing(ledger))
    on_gpu = replace(plan, config=replace(plan.config, gpus_per_trial=1.0))
    with pytest.raises(TooLargeError, match=r"stage train\), it has 25\.8 GB\. Leave out the mode masked-finetuning"):
        check_start(on_gpu, ledger, on_gpu.missing(ledger))


def test_the_disk_of_a_run_is_that_of_its_mode(plan: Plan, ledger: Ledger) -> None:
    run = find_run(plan, "llama", "boolq", "dense")
    measure(ledger, run, 1.0)
    folder = ledger.run_folder(run.run_id)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(bytes(10_000))
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    other = find_run(plan, "llama", "gsm8k", "dense")
    assert forecast(plan, ledger, [other]).disk_bytes == written > 10_000
    sparse = find_run(plan, "llama", "boolq", "sparse-to-dense")
    found = forecast(plan, ledger, [sparse])
    assert (found.disk_bytes, found.bounded) == (plan.estimate_bytes(sparse), 1)


def test_medians_of_nothing_and_of_an_even_number() -> None:
    run, groups = make_run(), (("model", "task"), ("model",))
    assert Medians([], groups).nearest(run) == ((), None)
    other = make_run(make_cell(task="gsm8k"))
    medians = Medians([(run, cost_taking(1.0)), (run, cost_taking(4.0)), (other, cost_taking(100.0))], groups)
    assert medians.nearest(run) == (("model", "task"), cost_taking(2.5))
    assert medians.nearest(make_run(make_cell(task="hellaswag"))) == (("model",), cost_taking(4.0))
    assert medians.nearest(make_run(make_cell(model="other"))) == ((), None)


def test_what_a_cs3_did_is_counted_apart(tmp_path: Path) -> None:
    config = SweepConfig.from_names({"models": "m", "backend": "cerebras", "num_csx": 2})
    run = make_run(make_cell(backend="cerebras"), cerebras={"target": "csx", "release": "2.9.0"})
    record = done_record(run)
    measured = {"trial_seconds": 900.0, "train_seconds": 60.0, "compile_seconds": 500.0, "held": {"CPU": 1.0}}
    measured |= {"queue_seconds": 10.0, "programming_seconds": 30.0}
    found = cost_of_run(run, replace(record, measured=record.measured | measured), tmp_path, config)
    assert (found.cpu_seconds, found.cs3_seconds, found.compile_seconds) == (900, 1200, 1000)
    assert found.scoring_seconds == 300
    on_cpu = cost_of_run(replace(run, cerebras={"target": "cpu", "release": "2.9.0"}), record, tmp_path, config)
    assert (on_cpu.cs3_seconds, on_cpu.compile_seconds) == (0, 0)


def test_how_many_trials_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    few = SweepConfig.from_names({"models": "m", "workers": 3})
    assert trials_at_once(few, "torch") == 3
    one_for_each = SweepConfig.from_names({"models": "m", "threads": 100_000})
    assert trials_at_once(one_for_each, "torch") == 1
    assert trials_at_once(replace(few, cerebras=Cerebras(cs3=2)), "cerebras") == 3
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert trials_at_once(one_for_each, "torch") is None
    assert trials_at_once(few, "cerebras") is None


def test_pilots_are_missing_runs_of_what_has_no_measured_one(plan: Plan, ledger: Ledger) -> None:
    assert len(pilots(plan, ledger, plan.missing(ledger))) == 4
    measure(ledger, find_run(plan, "llama", "boolq", "dense"), 1.0)
    chosen = pilots(plan, ledger, plan.missing(ledger))
    assert len({(run.cell.model, run.cell.task) for run in chosen}) == len(chosen) == 3
    assert {run.run_id for run in chosen} <= {run.run_id for run in plan.missing(ledger)}
    assert pilots(plan, ledger, []) == []


def test_the_lines_say_what_is_known_and_what_is_not(plan: Plan, ledger: Ledger) -> None:
    measure(ledger, find_run(plan, "llama", "boolq", "dense"), 3600.0, held={"CPU": 2.0})
    found = forecast(plan, ledger, plan.missing(ledger))
    lines = "\n".join(found.lines())
    assert "Time of 5 of 11 runs: 10 CPU-hours; 2.5 h on the clock" in lines
    assert "  2 as the median of measured runs of the same backend, model, task" in lines
    assert "gsm8k was measured here: its 3 missing runs have no forecast of time (--pilot measures one)" in lines
    found = replace(found, cs3_seconds=7200.0, compile_seconds=3600.0)
    assert "10 CPU-hours, 2 CS-3-hours (60 min of them compiling)" in "\n".join(found.lines())


def test_a_pilot_without_a_dry_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "smoke", "--pilot"]) == 2
    assert "--pilot runs a few cells for a forecast, so it goes with --dry-run" in capsys.readouterr().err


@pytest.mark.xdist_group("machine")
def test_a_pilot_runs_one_cell_of_each_kind_and_wastes_none(llama: Path, tmp_path: Path) -> None:
    command = ["sweep", "smoke", "--models", str(llama), "--tasks", "boolq", "--results-dir", str(tmp_path), "--json"]
    command += ["--data-dir", "synthetic"]
    ended = subprocess.run(
        [sys.executable, "-m", "tune_sparse", *command, "--dry-run", "--pilot"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    planned = json.loads(ended.stdout)
    assert planned["done"] == 1
    assert len(planned["missing"]) == 6
    assert planned["forecast"]["unmeasured"] == {}
    [pilot] = (tmp_path / "runs").glob("[!.]*")
    held = Ledger(tmp_path).record(pilot.name).measured["held"]  # type: ignore[union-attr]
    assert held == {"CPU": 1.0}
    assert planned["forecast"]["cpu_seconds"] > 0
    assert planned["forecast"]["wall_seconds"] > 0
