"""A scoring is kept, found again, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import write_boolq
from filelock import FileLock

from tune_sparse.cli import main
from tune_sparse.config import Protocol
from tune_sparse.config.protocol import SCORING
from tune_sparse.data.splits import Splits, load_splits
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError
from tune_sparse.evaluation.evaluations import Evaluation, EvaluationKey, LoadModel, evaluate
from tune_sparse.evaluation.outcomes import read_outcomes
from tune_sparse.files import read_json
from tune_sparse.models.checkpoints import load_model, load_tokenizer
from tune_sparse.training.budgets import CPU_BUDGETS

PROTOCOL = Protocol(precision="float32", max_tokens=256, max_new_tokens=4, n_selection=4)
BOOLQ = TASKS["boolq"]
OTHER: dict[str, Any] = {
    "precision": "bfloat16",
    "max_tokens": 128,
    "max_new_tokens": 5,
    "num_fewshot": 1,
    "n_test": 3,
    "threads": 2,
}


@pytest.fixture
def splits(tmp_path: Path) -> Splits:
    return load_splits(BOOLQ, write_boolq(tmp_path / "data", validation=12), PROTOCOL)


@pytest.fixture
def load_tiny(llama: Path) -> LoadModel:
    return lambda: (load_model(llama, torch.float32, torch.device("cpu")), load_tokenizer(llama))


def key(
    splits: Splits, protocol: Protocol = PROTOCOL, fingerprint: str = "f", evaluator: str = "tune-sparse"
) -> EvaluationKey:
    return EvaluationKey.from_protocol("tiny", fingerprint, BOOLQ, splits, protocol, evaluator)


def scored(splits: Splits, load_tiny: LoadModel, results: Path) -> Evaluation:
    return evaluate(key(splits), BOOLQ, splits, PROTOCOL, load_tiny, results, replace(CPU_BUDGETS, scoring_tokens=200))


def no_model() -> Any:
    pytest.fail("the model was loaded")


def test_a_scoring_is_kept_whole_and_found_again(splits: Splits, load_tiny: LoadModel, tmp_path: Path) -> None:
    first = scored(splits, load_tiny, tmp_path)
    assert {path.name for path in first.folder.iterdir()} == {"config.yaml", "result.json", "examples.parquet", ".lock"}
    assert (first.metrics["n_examples"], len(first.outcomes)) == (12, 12)
    assert first.metrics["accuracy"] == sum(bool(o.acc) for o in first.outcomes) / 12
    assert scored(splits, no_model, tmp_path) == first


@pytest.mark.parametrize("setting", SCORING)
def test_each_setting_is_a_scoring_of_its_own(setting: str, splits: Splits) -> None:
    assert set(OTHER) == set(SCORING)
    assert key(splits, replace(PROTOCOL, **{setting: OTHER[setting]})).name != key(splits).name


def test_weights_examples_and_evaluators_are_told_apart(splits: Splits) -> None:
    names = {key(splits).name, key(splits, fingerprint="g").name, key(splits, evaluator="lm-eval").name}
    assert len(names | {key(replace(splits, test=splits.test[:3])).name}) == 4


def test_an_unknown_evaluator_offers_the_closest(splits: Splits) -> None:
    with pytest.raises(InputError, match=r"unknown evaluator 'lm-evall'\. Did you mean 'lm-eval'"):
        key(splits, evaluator="lm-evall")


def test_a_second_process_is_refused(splits: Splits, tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / key(splits).name
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(InputError, match="one process at a time scores a model"):
        scored(splits, no_model, tmp_path)


def test_what_a_stopped_scoring_knew_is_kept_but_not_a_torn_line(
    splits: Splits, load_tiny: LoadModel, tmp_path: Path
) -> None:
    whole = scored(splits, load_tiny, tmp_path / "whole")
    folder = tmp_path / "stopped" / "evaluations" / whole.key.name
    folder.mkdir(parents=True)
    lines = [json.dumps([i, asdict(outcome)]) + "\n" for i, outcome in enumerate(whole.outcomes)]
    (folder / "outcomes.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    resumed = scored(splits, load_tiny, tmp_path / "stopped")
    assert resumed.outcomes == whole.outcomes
    assert read_json(folder / "result.json")["measured"]["examples_known_before"] == 5


def test_a_killed_scoring_ends_as_an_undisturbed_one(llama: Path, tmp_path: Path) -> None:
    """kill -9 after the first batches, in a process as a user starts it."""

    def command(results: Path) -> list[str]:
        chosen = ["--model", str(llama), "--tasks", "gsm8k", "--data-dir", "synthetic", "--results-dir", str(results)]
        settings = [
            "precision=float32",
            "max_tokens=256",
            "max_new_tokens=64",
            "n_test=60",
            "num_fewshot=0",
        ]
        return ["evaluate", *chosen, "--generation-tokens", "256", "--set", *settings]

    program = [sys.executable, "-m", "tune_sparse", *command(tmp_path / "killed")]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in (tmp_path / "killed").glob("evaluations/*/outcomes.jsonl")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed").glob("evaluations/*/result.json"))
    found = []
    for results in (tmp_path / "killed", tmp_path / "undisturbed"):
        assert main(command(results)) == 0
        [folder] = (results / "evaluations").iterdir()
        found.append((read_outcomes(folder / "examples.parquet"), read_json(folder / "result.json")))
    (killed, killed_result), (undisturbed, undisturbed_result) = found
    assert killed == undisturbed
    assert killed_result["metrics"] == undisturbed_result["metrics"]
    assert killed_result["measured"]["examples_known_before"] > 0
