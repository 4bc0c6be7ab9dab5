"""Memory and hours by the formula: of a sweep whose model, data and card are all somewhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, FAULT
from tune_sparse.config import Protocol, SweepConfig
from tune_sparse.evaluation.cards import CARDS, Card
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.evaluation.published import LLAMA_2_7B, OPT_1B3, OPT_125M, OPT_350M, TASKS, published_sizes
from tune_sparse.evaluation.seconds import CellSeconds, TaskSizes
from tune_sparse.models.other_weights import all_weights
from tune_sparse.sweep.estimate import Sizes, estimate, estimate_lines
from tune_sparse.sweep.examples import read_examples
from tune_sparse.sweep.plan import trained_points
from tune_sparse.training.budgets import Budgets

ROUND = Card("round", 80 << 30, 1e12, 1e12, 1e10)
BUDGETS = Budgets(1000, 1000, 1000, activation_checkpointing=False, keeps_effective_weights=False)


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command of a sweep of 7B models on a machine that has none, and no examples."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return ["sweep", "matrix", "--dry-run", "--results-dir", str(tmp_path / "results")]


def seconds(mode: str, sizes: TaskSizes, budgets: Budgets = BUDGETS) -> CellSeconds:
    protocol = Protocol(steps=10, global_batch_size=100)
    return CellSeconds(CellMemory(LLAMA_2_7B, mode, "unstructured", protocol), ROUND, budgets, sizes)


def test_training_is_counted_operations_and_bytes_over_rates() -> None:
    sizes = TaskSizes(50.0, 100, 20.0)
    plain, masked = (seconds(mode, sizes) for mode in ("sparse-to-dense", "sparse-to-sparse"))
    weights, tokens = 6_476_005_376, 10 * 100 * 50 * 1.07
    assert plain.training == pytest.approx(tokens * 4 * weights / 1e12)
    assert masked.training == pytest.approx(tokens * 6 * weights / 1e12 + tokens / 1000 * 50 * weights / 1e10)
    kept = seconds("sparse-to-sparse", sizes, Budgets(1000, 1000, 1000, True, True))
    assert kept.training == pytest.approx(tokens * 8 * weights / 1e12 + 10 * 50 * weights / 1e10)
    assert masked.scoring == pytest.approx(1.5 * 100 * 20 * 2 * weights / 0.75e12)
    assert plain.scoring == pytest.approx(masked.scoring * 2.5 / 1.5)


def test_generation_takes_steps_of_at_least_one_reading_of_the_weights() -> None:
    found = seconds("sparse-to-sparse", TaskSizes(50.0, 10, 0.0, is_generated=True))
    step = (found.cell.weights + 1000 * found.cell.cache_bytes) / 1e10
    assert found.scoring == pytest.approx(1.5 * (10 * 256 / 1000) * 256 * step)


def test_the_matrix_at_7b_takes_at_most_65_hours_on_an_h100() -> None:
    config = SweepConfig(models=("a/Llama-2-7b-hf", "b/other"))
    sizes = Sizes({"Llama-2-7b-hf": LLAMA_2_7B, "other": LLAMA_2_7B}, TASKS)
    found = estimate(config, trained_points(config), sizes, [CARDS["H100-80"], CARDS["T4"]])
    assert sum(kind.runs for kind in found) == 2 * 330
    assert 40 < sum(kind.seconds or 0 for kind in found) / 3600 <= 65
    assert {kind.too_small for kind in found if kind.card == "T4"} == {"it does not compute in bfloat16"}
    assert all(17e9 < kind.least_bytes < 22e9 for kind in found)


def test_without_anything_there_the_sizes_are_published_and_the_exit_status_says_so(
    nothing_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*nothing_here, "--models", "a/Llama-2-7b-hf", "--methods", "unstructured", "random"]) == FAULT
    printed = capsys.readouterr().out
    heading, cards, *rows, total = printed.partition("Seeds: ")[0].splitlines()[2:]
    assert heading.endswith("published sizes of Llama-2-7b-hf, boolq, hellaswag, gsm8k assumed:")
    assert cards.split() == ["A100-80", "H100-80", "H200"]
    modes = [[mode, "unstructured", "random"] for mode in SweepConfig(("m",)).modes]
    assert [row.split()[1:4] for row in rows] == [["dense", "none", "3"], *modes], "alike methods share a line"
    assert "54 runs, from" in rows[-1]
    assert total.startswith("  all that fit")


def test_published_sizes_of_opt_have_the_weights_of_its_checkpoints() -> None:
    """Counted by the formula that has the last norm, which the checkpoint of OPT-350m does without."""
    assert all_weights(OPT_125M) == 125_239_296
    assert all_weights(OPT_350M) - 2 * 1024 == 331_196_416
    assert all_weights(OPT_1B3) == 1_315_758_080


def test_what_is_not_published_has_no_estimate(nothing_here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*nothing_here, "--models", "a/unheard-of", "--tasks", "piqa", "--json"]) == FAULT
    found = json.loads(capsys.readouterr().out)["estimate"]
    assert (found["unknown"], found["assumed"], found["by_card"]) == (["unheard-of", "piqa"], [], [])
    assert published_sizes(["boolq", "piqa"]) is None
    assert estimate_lines([], Sizes({}, {}, (), ("piqa",))) == [
        "No estimate with piqa: not here, and no published size is known."
    ]


def test_other_cards_are_named(nothing_here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*nothing_here, "--modes", "masked-finetuning", "--for-gpu", "L40S", "H200", "--json"]) == FAULT
    by_card = json.loads(capsys.readouterr().out)["estimate"]["by_card"]
    assert {kind["card"]: kind["seconds"] is None for kind in by_card} == {"L40S": True, "H200": False}
    assert "stage train" in by_card[0]["too_small"]
    assert main([*nothing_here, "--for-gpu", "H300"]) == BAD_INPUT
    assert "unknown GPU 'H300'. Did you mean 'H200'" in capsys.readouterr().err


def test_a_mixture_is_trained_on_all_and_scored_on_each() -> None:
    both = published_sizes(["boolq", "gsm8k"])
    assert both == TaskSizes((153 + 181) / 2, 3270 + 1319, (3270 * 155 + 1319 * 75) / (3270 + 1319), True)


def test_the_sizes_of_examples_that_are_here_are_theirs() -> None:
    names = {"tasks": "boolq hellaswag gsm8k", "data_dir": "synthetic", "n_train": 30, "n_selection": 4, "n_test": 7}
    sizes = read_examples(SweepConfig.from_names({"models": "m"} | names)).sizes
    assert {task: found.test_examples for task, found in sizes.items()} == dict.fromkeys(sizes, 7)
    assert [task for task, found in sizes.items() if found.is_generated] == ["gsm8k"]
    assert all(5 < found.train_tokens < 200 for found in sizes.values())
