"""Whole searches, through Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from factories import write_boolq

from tune_sparse.cli import main
from tune_sparse.config import SweepConfig
from tune_sparse.errors import InputError, TooLargeError
from tune_sparse.files import read_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.lora.rank_space import Space
from tune_sparse.models.architectures import matrix_sizes
from tune_sparse.search.config import SearchConfig
from tune_sparse.search.driver import run_search
from tune_sparse.search.journal import SearchJournal
from tune_sparse.search.plan import plan_search
from tune_sparse.search.session import SearchSession

GROUPS = {
    "qkv": {"modules": ["q_proj", "k_proj", "v_proj"], "ranks": [4, 2, 1]},
    "up": {"modules": ["up_proj"], "ranks": [4, 2, 0]},
}
SETTINGS = [
    *(
        "steps=3",
        "warmup_steps=0",
        "global_batch_size=4",
        "lora_rank=4",
        "lora_alpha=8",
        "n_train=16",
    ),
    *("n_selection=12", "n_test=6", "eval_every=3", "calibration_tokens=96", "max_tokens=128", "max_new_tokens=4"),
]


def arguments(llama: Path, folder: Path, *more: str) -> list[str]:
    space = folder / "space.yaml"
    space.write_text(json.dumps(GROUPS))
    data_dir = write_boolq(folder / "data", train=40, validation=6)
    places = ["--data-dir", str(data_dir), "--results-dir", str(folder / "results"), "--space", str(space)]
    model = ["--model", str(llama), "--task", "boolq", "--sparsity", "0.5"]
    return ["search", *model, *places, "--trials", "10", "--workers", "1", "--in-order", *more, "--set", *SETTINGS]


def config(llama: Path, folder: Path, **changes: Any) -> SearchConfig:
    names = {
        "models": str(llama),
        "tasks": "boolq",
        "methods": "unstructured",
        "sparsities": 0.5,
        "modes": "sparse-to-sparse",
        "data_dir": str(write_boolq(folder / "data", train=40)),
        "results_dir": str(folder / "results"),
        "lora_rank": 4,
        "n_selection": 12,
        "max_tokens": 128,
        "max_new_tokens": 4,
    }
    own = {n: changes.pop(n) for n in list(changes) if n in SearchConfig.__dataclass_fields__}
    return SearchConfig(**{"sweep": SweepConfig.from_names(names | changes), "space": Space.from_groups(GROUPS)} | own)


@pytest.mark.slow
def test_a_search_ends_with_a_proved_winner_and_starting_it_again_scores_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama, tmp_path, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    folder = Path(found["folder"])
    assert found["candidates"] == 10
    assert set(found["test"]) == {"winner", "heuristic", "maximal", "plain"}
    assert found["test"]["maximal"]["interval_95"] == [0.0, 0.0]
    assert read_json(folder / "winner" / "validation_report.json")["all_valid"]
    for name in ("pareto_front.png", "accuracy_over_trials.png", "ranks.png", "importance.png", "test.csv"):
        assert (folder / name).stat().st_size > 100, name
    ledger = Ledger(tmp_path / "results")
    assert ledger.is_done(found["super_adapter_run"])
    assert ledger.sweeps() == [], "a search is no cell of a matrix"
    tracked_as(ledger, folder.name)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "candidates").rglob("*.json")}
    assert main(arguments(llama, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "10 candidates by nsga2" in printed
    assert "of the parameters, test accuracy" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def tracked_as(ledger: Ledger, search_id: str) -> None:
    """MLflow has a parent run for the search, with the front as an artifact, and a child for each suggestion."""
    from mlflow import MlflowClient

    from tune_sparse.tracking.entries import SEARCH_TAG
    from tune_sparse.tracking.sync import EXPERIMENT, default_uri, track_ledger

    uri = default_uri(ledger.folder)
    track_ledger(ledger, uri)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    [parent] = [run for run in runs if run.data.tags.get(SEARCH_TAG) == search_id]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(SearchJournal(ledger.folder / "searches" / search_id).suggestions)
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"result.json", "pareto_front.png"} <= names


@pytest.mark.slow
def test_a_killed_driver_scores_no_configuration_twice_and_ends_with_the_same_front(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-m", "tune_sparse", *arguments(llama, killed)],
        env=os.environ | {"TUNE_SPARSE_CACHE": str(llama.parents[1])},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    candidates = killed / "results" / "candidates"
    until = time.monotonic() + 240
    while len(list(candidates.rglob("[0-9a-f]*.json"))) < 4 and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in candidates.rglob("[0-9a-f]*.json")}
    assert 4 <= len(before) < 10
    complete = {path for path in before if "-" not in read_json(path)["correctness"]}
    assert main(arguments(llama, killed, "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in complete} == {path: before[path] for path in complete}
    assert main(arguments(llama, whole, "--json")) == 0
    undisturbed = json.loads(capsys.readouterr().out)
    for name in ("front", "winner", "candidates", "suggestions", "answered_fraction", "test"):
        assert again[name] == undisturbed[name], name


def test_a_dry_run_says_what_would_be_searched(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(llama, tmp_path, "--dry-run", "--json")) == 0
    [value] = json.loads(capsys.readouterr().out)
    assert (value["trials"], value["selection_examples"], value["super_adapter_is_trained"]) == (10, 12, False)
    assert main(arguments(llama, tmp_path, "--dry-run")) == 0
    assert "12 selection examples" in capsys.readouterr().out


def test_a_dry_run_of_what_is_not_ready_says_so_by_its_status(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(arguments(llama, tmp_path, "--dry-run", "--model", "a/not-here")) == 1
    assert "boolq: not ready to run: " in capsys.readouterr().out


@pytest.fixture
def session(llama: Path, tmp_path: Path) -> SearchSession:
    plan = plan_search(config(llama, tmp_path, deterministic=True, scoring_tokens=512))
    ledger = Ledger(tmp_path / "results")
    return SearchSession(plan, ledger, SearchJournal(ledger.folder / "searches" / "s"), "token", 1, print)


def test_a_trial_of_a_search_has_the_settings_of_its_user(session: SearchSession) -> None:
    trial = session.settings(session.plan.run)
    assert trial["deterministic"] is True
    assert trial["run"]["budgets"]["scoring_tokens"] == 512


def test_a_super_adapter_that_no_gpu_can_hold_is_refused_before_ray_starts(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho '0, GPU-aa11, Small, 100, 9.0'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan = plan_search(config(llama, tmp_path, gpus_per_trial=1))
    with pytest.raises(TooLargeError, match="on Small: a device must hold a cell"):
        run_search(plan)


def test_a_search_differs_by_what_decides_its_candidates(llama: Path, tmp_path: Path) -> None:
    plans = [
        plan_search(config(llama, tmp_path, **changes))
        for changes in ({}, {"sampler": "tpe"}, {"objectives": ("accuracy",)}, {"is_racing": False}, {"in_order": True})
    ]
    assert len({plan.search_id for plan in plans}) == 5
    assert len({plan.run.run_id for plan in plans}) == 1
    assert plan_search(config(llama, tmp_path, trials=3)).search_id == plans[0].search_id, "more trials go on"
    assert plan_search(config(llama, tmp_path, sampling="sandwich")).run != plans[0].run


def test_parameters_are_those_of_the_models_matrices(llama: Path, tmp_path: Path) -> None:
    import torch

    from tune_sparse.models.checkpoints import load_model, prunable_weights

    plan = plan_search(config(llama, tmp_path))
    own = prunable_weights(load_model(llama, torch.float32, torch.device("cpu")))
    assert matrix_sizes(plan.dims) == {name: tuple(weight.shape) for name, weight in own.items()}
    flops = plan_search(config(llama, tmp_path, objectives=("accuracy", "inference_flops")))
    ranks = plan.space.heuristic(plan.dims.num_layers)
    assert flops.cost(ranks) == 2 * 2048 * plan.cost(ranks) == 2 * 2048 * plan.parameters(ranks)


def test_the_plain_lora_has_the_size_that_is_asked_and_the_same_scaling(llama: Path, tmp_path: Path) -> None:
    plan = plan_search(config(llama, tmp_path))
    maximal = plan.parameters(plan.space.maximal(plan.dims.num_layers))
    plain = plan.plain_run(maximal // 2)
    assert plain.protocol.lora_rank == 2
    assert plain.protocol.lora_alpha / 2 == plan.run.protocol.lora_alpha / 4
    assert plain.super_adapter is not None
    assert plain.super_adapter.space.modules == plan.space.modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "nsga"}, "unknown sampler 'nsga'. Did you mean 'nsga2'"),
        ({"sampling": "even"}, "unknown sampling 'even'"),
        ({"objectives": ("speed",)}, "unknown objective 'speed'"),
        ({"objectives": ("parameters",)}, "objectives are accuracy, and at most one cost"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"modes": "masked-finetuning", "lora_rank": 16}, "masked-finetuning trains none"),
        ({"backend": "cerebras"}, "its backend must be torch"),
        ({"tasks": "boolq gsm8k"}, "a search adapts one cell, so tasks must name one"),
        ({"workers": 999}, "this machine holds [0-9]+, got 999 workers"),
        ({"lora_rank": 2}, "no rank of a space may be above the super-adapter's, 2"),
        ({"tasks": "boolq+hellaswag"}, "accuracy of one task with questions"),
        ({"tasks": "wikitext2"}, "accuracy of one task with questions"),
    ],
)
def test_bad_input_is_named_before_anything_runs(
    llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_search(config(llama, tmp_path, **changes))


def test_a_group_that_the_model_lacks_is_named(llama: Path, tmp_path: Path) -> None:
    space = Space.from_groups({"fc": {"modules": ["fc1"], "ranks": [4]}})
    with pytest.raises(InputError, match="unknown module of the group 'fc' 'fc1'"):
        plan_search(config(llama, tmp_path, space=space))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--space", "shaers"], "unknown space 'shaers'. Did you mean 'shears'"),
        (["--sampler", "nsga"], "unknown sampler"),
        (["embeded"], "unknown preset 'embeded'"),
        (["--set", "lora_rank"], "NAME=VALUE"),
        (["--deterministic", "--scoring-tokens", "1"], "scoring_tokens must be at least 2"),
    ],
)
def test_a_wrong_flag_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["search", "--results-dir", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
