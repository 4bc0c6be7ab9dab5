"""`tune-sparse evaluate` as a user calls it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import finished, tiny_run, write_boolq, write_jsonl

from trainables.worker import WorkerCache
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, FAULT, OK
from tune_sparse.config import Protocol
from tune_sparse.data.tasks import TASKS
from tune_sparse.evaluation.outcomes import read_outcomes, write_outcomes
from tune_sparse.evaluation.scored_as import scoring_settings
from tune_sparse.export.merge import merge_run
from tune_sparse.ledger.ledger import Ledger

SMALL = ["--set", "precision=float32", "max_tokens=256", "max_new_tokens=4", "n_test=4"]

SCORED_AS_TOY = {"precision": "float32", "max_tokens": 256, "num_fewshot": 0, "threads": 1}

Evaluate = Callable[..., Any]


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs the command with --json; returns (exit status, what was printed as JSON or as an error)."""

    def run(*arguments: str) -> tuple[int, Any]:
        status = main(["evaluate", *arguments, "--results-dir", str(tmp_path / "results"), "--json"])
        printed = capsys.readouterr()
        return status, printed.err if status == BAD_INPUT else json.loads(printed.out)

    return run


@pytest.fixture
def run_id(llama: Path, tmp_path: Path) -> str:
    """A finished run in the results folder."""
    run = tiny_run(llama, write_boolq(tmp_path / "data", train=30, validation=10))
    assert finished(run, Ledger(tmp_path / "results"), WorkerCache()).status == "done"
    return run.run_id


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_scored_on_real_examples(task: str, llama: Path, real_examples: Path, evaluate: Evaluate) -> None:
    chosen = ["--model", str(llama), "--tasks", task, "--data-dir", str(real_examples)]
    status, [found] = evaluate(*chosen, *SMALL, "num_fewshot=0")
    assert (status, found["task"], found["n_examples"]) == (OK, task, 4)
    assert found["perplexity"] > 1 if TASKS[task].chance is None else 0 <= found["accuracy"] <= 1


def test_the_few_shot_default_is_that_of_the_task(llama: Path, evaluate: Evaluate) -> None:
    chosen = ["--model", str(llama), "--tasks", "gsm8k", "boolq", "--data-dir", "synthetic"]
    _, found = evaluate(*chosen, *SMALL)
    assert [result["settings"]["num_fewshot"] for result in found] == [5, 0]


def test_a_mixture_is_scored_task_by_task(llama: Path, evaluate: Evaluate) -> None:
    status, found = evaluate("--model", str(llama), "--tasks", "boolq+hellaswag", "--data-dir", "synthetic", *SMALL)
    assert (status, [result["task"] for result in found]) == (OK, ["boolq", "hellaswag"])


@pytest.mark.parametrize("evaluator", ["tune-sparse", "lm-eval"])
def test_a_finished_run_is_scored_again_and_agrees_with_its_record(
    evaluator: str, run_id: str, evaluate: Evaluate, tmp_path: Path
) -> None:
    if evaluator == "lm-eval":
        pytest.importorskip("lm_eval")
    status, [found] = evaluate("--run", run_id, "--evaluator", evaluator)
    record = Ledger(tmp_path / "results").record(run_id)
    assert record is not None
    assert (status, found["differ_from_record"], found["n_examples"]) == (OK, 0, 8)
    assert found["accuracy"] == record.metrics["accuracy"]


def test_a_record_that_the_run_does_not_answer_to_is_a_fault(run_id: str, evaluate: Evaluate, tmp_path: Path) -> None:
    path = Ledger(tmp_path / "results").run_folder(run_id) / "examples.parquet"
    first, *others = read_outcomes(path)
    write_outcomes(path, [type(first)(**vars(first) | {"acc": not first.acc}), *others])
    status, [found] = evaluate("--run", run_id)
    assert (status, found["differ_from_record"]) == (FAULT, 1)


def test_a_run_is_scored_on_another_task_with_its_own_settings(run_id: str, evaluate: Evaluate) -> None:
    status, [found] = evaluate("--run", run_id, "--tasks", "gsm8k", "--data-dir", "synthetic")
    assert (status, found["n_examples"], found["settings"]["max_new_tokens"]) == (OK, 8, 4)


def test_an_adapter_changes_what_is_scored(llama: Path, run_id: str, evaluate: Evaluate, tmp_path: Path) -> None:
    adapter = Ledger(tmp_path / "results").run_folder(run_id) / "adapter"
    chosen = ["--model", str(llama), "--tasks", "boolq", "--data-dir", "synthetic"]
    status, error = evaluate(*chosen, "--adapter", str(adapter), *SMALL)
    assert status == BAD_INPUT
    assert "belongs to the mask" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "LLAMA"], "evaluate needs tasks, got none. Give --tasks."),
        (["--model", "LLAMA", "--tasks", "bolq"], "unknown task 'bolq'. Did you mean 'boolq'?"),
        (["--model", "LLAMA", "--tasks", "boolq"], "examples of the tasks are needed, got no data_dir."),
        (
            ["--model", "LLAMA", "--tasks", "boolq", "--data-dir", "DATA", "--set", "steps=4"],
            "unknown setting of scoring",
        ),
        (
            ["--model", "LLAMA", "--tasks", "boolq", "--data-dir", "DATA", "--set", "n_test=0"],
            "n_test must be at least 1",
        ),
        (
            ["--model", "LLAMA", "--tasks", "boolq", "--data-dir", "DATA", "--adapter", "DATA"],
            "needs adapter_config.json",
        ),
        (["--model", "LLAMA", "--tasks", "boolq", "--data-dir", "DATA", "--evaluator", "lm"], "unknown evaluator 'lm'"),
        (["--model", "LLAMA", "--tasks", "mawps", "--data-dir", "DATA", "--evaluator", "lm-eval"], "got 'mawps'"),
        (
            ["--model", "LLAMA", "--tasks", "hellaswag", "--data-dir", "DATA"],
            "a choice of hellaswag must have a question and a text",
        ),
        (
            ["--model", "LLAMA", "--tasks", "arc_easy", "--data-dir", "DATA"],
            "arc_easy/test.jsonl must have at least one example",
        ),
        (["--run", "torch"], "unknown finished run 'torch'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_scored(
    arguments: list[str], message: str, llama: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    data_dir = write_boolq(tmp_path / "data")
    question = {"original_text": "Half of 4 ?", "ans": 2.0}
    for split, passage in (("train", "a"), ("test", "b"), ("validation", "c")):
        write_jsonl(data_dir / "mawps" / f"{split}.jsonl", [question | {"original_text": f"{passage} ?"}] * 3)
        write_jsonl(data_dir / "arc_easy" / f"{split}.jsonl", [] if split == "test" else [ARC])
        write_jsonl(data_dir / "hellaswag" / f"{split}.jsonl", [HELLASWAG])
    places = {"LLAMA": str(llama), "DATA": str(data_dir)}
    status, error = evaluate(*(places.get(argument, argument) for argument in arguments))
    assert status == BAD_INPUT
    assert message in error
    assert not (tmp_path / "results" / "evaluations").exists()


ARC = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
HELLASWAG = {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["d", " "], "label": "0"}


@pytest.fixture
def merged(llama: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A merged model of a run of gsm8k, and the metrics of the run."""
    run = tiny_run(llama, task="gsm8k", num_fewshot=1, max_new_tokens=6, n_test=5)
    ledger = Ledger(tmp_path / "results")
    record = finished(run, ledger)
    assert record.status == "done"
    merge_run(ledger, run.run_id, tmp_path / "merged")
    return tmp_path / "merged", record.metrics | {"run_id": run.run_id}


def test_a_merged_model_is_scored_as_its_run_was(merged: tuple[Path, dict[str, Any]], evaluate: Evaluate) -> None:
    folder, run = merged
    scored = json.loads((folder / "tune_sparse_merge.json").read_text())["scored_as"]
    assert (scored["tasks"], scored["data_dir"], scored["settings"]["num_fewshot"]) == (["gsm8k"], "synthetic", 1)
    status, [found] = evaluate("--model", str(folder))
    assert (status, found["task"], found["n_examples"]) == (OK, "gsm8k", 5)
    assert found["accuracy"] == run["accuracy"]
    ledger = Ledger(folder.parent / "results")
    assert read_outcomes(Path(found["folder"]) / "examples.parquet") == read_outcomes(
        ledger.run_folder(run["run_id"]) / "examples.parquet"
    ), "an accuracy of 0 says little"
    assert found["settings"] == scored["settings"]
    [note] = found["notes"]
    assert note.startswith(f"gsm8k is scored as by run {run['run_id']}: precision float32, max_tokens 256, ")
    assert note.endswith("examples of synthetic")


def test_what_differs_from_the_run_of_a_merged_model_is_said(
    merged: tuple[Path, dict[str, Any]], evaluate: Evaluate
) -> None:
    chosen = ["--model", str(merged[0]), "--tasks", "gsm8k", "boolq", "--set", "num_fewshot=1", "n_test=4"]
    _, [gsm8k, boolq] = evaluate(*chosen)
    changed, others = gsm8k["notes"]
    assert "is not scored as by run" in changed
    assert "since you set n_test 4 (there 5): precision float32" in changed
    assert others.startswith("gsm8k: the test examples are not those of run ")
    assert boolq["notes"][0].startswith("boolq is no task of run ")
    assert (boolq["settings"]["precision"], boolq["settings"]["max_new_tokens"]) == ("float32", 256)


SOUND = {"origin": "run R", "settings": scoring_settings(Protocol()), "data_dir": "synthetic", "tasks": ["boolq"]}


@pytest.mark.parametrize(
    "mark",
    [
        "run R",
        {"origin": "run R"},
        SOUND | {"judge": "x"},
        SOUND | {"tasks": 1},
        SOUND | {"settings": {"num_fewshot": 1}},
        SOUND | {"settings": scoring_settings(Protocol()) | {"precision": "float64"}},
    ],
)
def test_a_mark_of_another_version_is_refused_by_its_file(
    mark: Any, llama: Path, tmp_path: Path, evaluate: Evaluate
) -> None:
    folder = shutil.copytree(llama, tmp_path / "merged")
    (folder / "tune_sparse_merge.json").write_text(json.dumps({"scored_as": mark}))
    status, error = evaluate("--model", str(folder))
    assert status == BAD_INPUT
    assert re.search(r"tune_sparse_merge\.json must say how .*Merge the run again, or remove the file", error)


def test_a_toy_model_is_scored_as_toy_models_are(
    llama: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_sparse.models.toy_models.toy_model_folder", lambda name: llama)
    _, [found] = evaluate("--model", "tiny-llama", "--tasks", "gsm8k", "--set", "n_test=2", "max_new_tokens=4")
    assert found["settings"] == {**SCORED_AS_TOY, "n_test": 2, "max_new_tokens": 4}
    assert "since you set n_test 2 (there 200), max_new_tokens 4 (there 40)" in found["notes"][0]
