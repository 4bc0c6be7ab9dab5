"""The metrics that whole cells record, and how a reader judges by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import done_record, finished, make_cell, make_run, make_sweep, tiny_run, write_run

from analysis.read.load import cells_table
from analysis.read.results import read_results
from trainables.peak_memory import PeakMemory
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, OK
from tune_sparse.data.batching import target_tokens
from tune_sparse.data.splits import Encoded
from tune_sparse.evaluation.metrics import MEAN, SUFFIXES
from tune_sparse.evaluation.outcomes import read_outcomes
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.models.checkpoints import check_checkpoint

MIXTURE = "hellaswag+gsm8k"
OF_TASK = {"hellaswag": ("acc", "acc_norm"), "gsm8k": ("exact_match_strict", "exact_match_flexible")}


@pytest.fixture(scope="module")
def mixed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, Record]:
    """A run on a mixture whose last mask changes much, and whose answers are cut after a few tokens."""
    ledger = Ledger(tmp_path_factory.mktemp("mixed"))
    record = finished(tiny_run(llama, task=MIXTURE, mode="sparse-to-dense", sparsity=0.7, learning_rate=0.1), ledger)
    assert record.status == "done", record.error
    return ledger, record


def test_a_record_has_every_metric_of_its_tasks(mixed: tuple[Ledger, Record]) -> None:
    metrics = mixed[1].metrics
    assert metrics["primary_metric"] == MEAN
    for task, names in OF_TASK.items():
        found = metrics["by_task"][task]
        assert {f"{name}{suffix}" for name in (*names, "accuracy") for suffix in SUFFIXES} <= found.keys()
        for suffix in SUFFIXES:
            assert found[f"accuracy{suffix}"] == found[found["primary_metric"] + suffix]
    for suffix in ("", "_before_tuning", "_before_merge"):
        each = [found[f"accuracy{suffix}"] for found in metrics["by_task"].values()]
        assert metrics[f"accuracy{suffix}"] == pytest.approx(sum(each) / 2)


def test_answers_that_the_limit_ended_are_counted(mixed: tuple[Ledger, Record]) -> None:
    """A random model ends no answer within 4 tokens."""
    ledger, record = mixed
    [path] = (ledger.folder / "pruned_baselines").glob("*.parquet")
    assert {(outcome.task, outcome.cut) for outcome in read_outcomes(path)} == {("hellaswag", None), ("gsm8k", True)}
    [path] = (ledger.folder / "pruned_baselines").glob("*.json")
    before = json.loads(path.read_text())["metrics"]
    assert before["cut_fraction"] == before["by_task"]["gsm8k"]["cut_fraction"] == 1.0
    outcomes = read_outcomes(ledger.run_folder(record.run_id) / "examples.parquet")
    cut = [outcome.cut for outcome in outcomes if outcome.task == "gsm8k"]
    assert record.metrics["cut_fraction"] == cut.count(True) / len(cut)


def test_the_eval_loss_is_recorded_on_both_sides_of_the_last_mask(mixed: tuple[Ledger, Record]) -> None:
    """Training watched the model without that mask: beside its loss, the one after it looks like over-fitting."""
    ledger, record = mixed
    lines = (ledger.run_folder(record.run_id) / "metrics.jsonl").read_text().splitlines()
    watched = [point["eval_loss"] for point in map(json.loads, lines) if "eval_loss" in point]
    assert record.metrics["eval_loss_before_mask"] == pytest.approx(watched[-1], rel=1e-3)
    assert abs(record.metrics["eval_loss"] - watched[-1]) > 0.01


@pytest.mark.parametrize("chosen", [{}, {"hellaswag": "acc"}, {"hellaswag": "acc", "gsm8k": "exact_match_flexible"}])
def test_predictions_are_judged_by_the_metric_that_is_asked_for(
    chosen: dict[str, str], mixed: tuple[Ledger, Record]
) -> None:
    ledger, record = mixed
    [files] = read_results([ledger.folder], primary_metrics=chosen).done
    judges = {task: chosen.get(task, found["primary_metric"]) for task, found in record.metrics["by_task"].items()}
    outcomes = read_outcomes(ledger.run_folder(record.run_id) / "examples.parquet")
    right = {(o.task, o.id): o.is_right(judges[o.task]) for o in outcomes}
    assert files.predictions is not None
    assert files.pruned_baseline is not None
    names = zip(files.predictions.tasks, files.predictions.ids, strict=True)
    assert np.array_equal(files.predictions.scores, [right[name] for name in names])
    assert files.record.metrics["accuracy"] == pytest.approx(files.predictions.mean())
    assert files.record.metrics["accuracy_before_tuning"] == pytest.approx(files.pruned_baseline.mean())


def test_the_memory_of_training_is_not_that_of_another_stage(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without a last mask there is no eval loss before it."""
    peaks = {"score": 4_062, "score before tuning": 4_000, "train": 1_768}

    def end(memory: PeakMemory, stage: str) -> None:
        memory.by_stage[stage] = peaks.get(stage, 1)

    monkeypatch.setattr(PeakMemory, "end", end)
    record = finished(tiny_run(llama, mode="sparse-to-sparse"), Ledger(tmp_path))
    assert (record.measured["peak_memory_bytes"], record.measured["cell_peak_memory_bytes"]) == (1_768, 4_062)
    assert record.metrics["eval_loss_before_mask"] is None


def test_the_flops_of_a_step_count_the_tokens_of_the_loss(llama: Path, tmp_path: Path) -> None:
    """The head works for each of them: 4 FLOPs a weight, forward and backward."""
    from trainables import pipeline

    dims, seen = check_checkpoint(str(llama)).dims, []
    original = pipeline._step_flops

    def step_flops(work: Any, *others: Any) -> int | None:
        seen.append((work.examples.train, original(work, *others)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_step_flops", step_flops)
        for on_prompt in (False, True):
            run = tiny_run(llama, mode="sparse-to-sparse", train_on_prompt=on_prompt)
            assert finished(run, Ledger(tmp_path)).metrics["train_step_flops"] == seen[-1][1]
    [(train, without), (_, with_prompt)] = seen
    prompt_tokens = sum(target_tokens(e, True) - target_tokens(e, False) for e in train)
    expected = 4 * prompt_tokens * dims.hidden_size * dims.vocab_size * 4 / len(train)
    assert with_prompt - without == pytest.approx(expected, abs=2)


@pytest.mark.parametrize(
    ("example", "answer", "all_of_it"),
    [(Encoded((1, 2, 3), (4, 5)), 2, 4), (Encoded((), (4, 5, 6)), 2, 2), (Encoded((1,), (4,)), 1, 1)],
)
def test_the_tokens_of_the_loss_by_hand(example: Encoded, answer: int, all_of_it: int) -> None:
    assert (target_tokens(example, False), target_tokens(example, True)) == (answer, all_of_it)


@pytest.fixture
def by_hand(tmp_path: Path) -> Ledger:
    """One cell of hellaswag, 0.7 by acc_norm and 0.4 by acc."""
    ledger, cell = Ledger(tmp_path / "results"), make_cell(task="hellaswag", mode="sparse-to-sparse")
    ledger.write_sweep(make_sweep([cell]))
    metrics = {"acc": 0.4, "acc_stderr": 0.02, "acc_before_tuning": 0.3, "acc_before_merge": None}
    write_run(ledger, make_run(cell), done_record(make_run(cell), 0.7, **metrics))
    return ledger


def test_the_cells_are_judged_by_the_metric_that_is_asked_for(by_hand: Ledger) -> None:
    names = ["primary_metric", "accuracy", "accuracy_stderr", "accuracy_before_tuning", "acc", "acc_norm"]
    [own] = cells_table([by_hand.folder])[names].values.tolist()
    [chosen] = cells_table([by_hand.folder], None, {"hellaswag": "acc"})[names].values.tolist()
    assert own == ["acc_norm", 0.7, 0.03, 0.5, 0.4, 0.7]
    assert chosen == ["acc", 0.4, 0.02, 0.3, 0.4, 0.7]


def test_a_report_is_refused_a_metric_that_a_task_has_not(by_hand: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--results-dir", str(by_hand.folder)]
    assert main(["report", *folder, "--primary-metric", "hellaswag=accuracy"]) == BAD_INPUT
    assert "unknown metric of hellaswag 'accuracy'. Did you mean 'acc'" in capsys.readouterr().err
    assert not (by_hand.folder / "analysis").exists()


def test_a_scoring_prints_every_metric_with_its_error_and_marks_the_primary_one(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "precision=float32", "max_tokens=256", "max_new_tokens=4", "n_test=4", "num_fewshot=0"]
    chosen = ["--model", str(llama), "--data-dir", "synthetic", "--results-dir", str(tmp_path / "results")]
    assert main(["evaluate", *chosen, "--tasks", "hellaswag", "gsm8k", *settings]) == OK
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines if " +- " in line]
    assert [(row[0], row[4:]) for row in words] == [
        ("acc_norm", ["primary"]),
        ("acc", []),
        ("exact_match_strict", ["primary"]),
        ("exact_match_flexible", []),
    ]
    assert lines[-1] == "  100.0% of the answers were cut at max_new_tokens=4: raise it by --set"
