"""Published numbers: the built-in files hold to their own rules, and whatever breaks one is named with its line."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from analysis.baselines.published import (
    BUILT_IN,
    COLUMNS,
    KINDS,
    METRICS,
    Published,
    as_runs,
    find_conflicts,
    load_published,
    read_published,
)
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError

ROW = {
    "source": "A paper",
    "address": "https://example.org/paper",
    "table": "Table 1",
    "kind": "printed",
    "model": "Mistral-7B-v0.3",
    "task": "gsm8k",
    "method": "wanda",
    "tuning": "LoRA",
    "training": "task",
    "mode": "sparse-to-sparse",
    "sparsity": "0.5",
    "num_fewshot": "5",
    "context_tokens": "",
    "metric": "exact_match_strict",
    "value": "0.501",
    "hardware": "",
    "notes": "with, a comma",
}


def write_published(path: Path, *changes: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(ROW | change for change in changes)
    return path


def test_the_built_in_numbers_are_all_there() -> None:
    rows = load_published()
    assert len(rows) == 461
    assert {row.kind for row in rows} == KINDS.keys()
    assert sum(row.value is None for row in rows) == 20
    assert {row.metric for row in rows} <= METRICS.keys()


def test_of_phoenix_only_the_digitised_figure_has_numbers() -> None:
    phoenix = [row for row in load_published() if row.source.startswith("Phoenix")]
    known = [row for row in phoenix if row.value is not None]
    assert len(phoenix) == 28
    assert {(row.kind, row.metric.rsplit("_", 1)[0]) for row in known} == {("digitised", "inference_flops")}
    assert {row.hardware: row.value for row in known if row.metric == "inference_flops_8192"} == {
        "A100": 1.411e14,
        "CS-2": 0.878e14,
    }


def test_a_row_is_read_as_it_is_written(tmp_path: Path) -> None:
    [row] = read_published(write_published(tmp_path / "own.csv", {}))
    assert asdict(row) == ROW | {"sparsity": 0.5, "num_fewshot": 5, "context_tokens": None, "value": 0.501}


def test_what_was_not_trained_is_named_as_ours_before_tuning() -> None:
    [run] = as_runs([published(metric="acc", training="none")])
    assert run.metrics == {"acc_before_tuning": 0.501}
    assert run.params["training"] == "none"


def test_two_commits_of_one_table_contradict_each_other() -> None:
    conflicts = find_conflicts(load_published())
    assert {row.source for row in conflicts} == {"Okwy-UE/project3-sparse-ft"}
    assert len(conflicts) == 24
    assert all("commit" in row.table and len(others) == 1 for row, others in conflicts.items())


def test_printed_tables_are_there_as_printed() -> None:
    by_source: dict[str, list[float | None]] = {}
    for row in load_published():
        by_source.setdefault(row.source.split(" ")[0], []).append(row.value)
    assert by_source["MaskLLM"] == [5.12, 10.42, 6.78, 5.75, 17.64, 8.49, 5.89, 18.65, 8.58]
    assert by_source["EBFT"] == [16.88, 75.14, 16.27, 16.44]
    assert by_source["vuiseng9"] == [0.651, 0.5, 0.393, 0.287]
    assert by_source["Aaquib111/Sparse-GPT-Finetuning"] == [27.66, 22.01]
    assert (by_source["ikawrakow"], by_source["nanoGPT"]) == ([4.1049], [1.4697])
    assert len(by_source["SLiM"]) == 72
    assert by_source["SLiM"][:3] + by_source["SLiM"][-2:] == [0.359, 0.371, 0.434, 0.5426, 0.5785]


def test_a_number_that_is_entered_takes_the_place_of_the_empty_line(tmp_path: Path) -> None:
    [phoenix, *_] = BUILT_IN
    [address] = {row.address for row in read_published(phoenix) if row.source == "Phoenix"}
    entered = {"source": "Phoenix", "address": address, "metric": "exact_match_flexible", "value": "0.5"}
    rows = load_published([write_published(tmp_path / "own.csv", entered)])
    [found] = [r for r in rows if r.address == address and r.model == ROW["model"] and r.task == "gsm8k"]
    assert found.value == 0.5
    assert sum(row.value is None for row in rows) == 19


def test_a_model_of_the_results_is_known(tmp_path: Path) -> None:
    path = write_published(tmp_path / "own.csv", {"model": "tiny-llama"})
    with pytest.raises(InputError, match="unknown model 'tiny-llama'"):
        load_published([path])
    assert any(row.model == "tiny-llama" for row in load_published([path], ["tiny-llama"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Mistral-7B-v3"}, r"unknown model 'Mistral-7B-v3'\. Did you mean 'Mistral-7B-v0\.3'"),
        ({"task": "gsm9k"}, r"unknown task 'gsm9k'\. Did you mean 'gsm8k'"),
        ({"task": "gsm8k+boolk"}, r"unknown task 'boolk'\. Did you mean 'boolq'"),
        ({"kind": "guessed"}, "unknown kind 'guessed'"),
        ({"metric": "accuracy"}, "unknown metric 'accuracy'"),
        ({"training": "taks"}, r"unknown training 'taks'\. Did you mean 'task'"),
        ({"mode": "sparse"}, "unknown mode 'sparse'"),
        ({"value": "50.1"}, r"exact_match_strict must be in \[0, 1\], got 50\.1\. Did you mean 0\.501\?"),
        ({"value": "-0.1"}, r"exact_match_strict must be in \[0, 1\], got -0\.1\. Fix"),
        ({"value": "nan"}, r"exact_match_strict must be in \[0, 1\], got nan"),
        ({"metric": "perplexity", "value": "inf"}, "perplexity must be finite and at least 0, got inf"),
        ({"value": "50%"}, "value must be a number or empty, got '50%'. Write 0.5, not 50%"),
        ({"sparsity": "1"}, r"sparsity must be in \[0, 1\), got 1\. "),
        ({"sparsity": "50"}, r"sparsity must be in \[0, 1\), got 50\. Did you mean 0\.5\?"),
        ({"num_fewshot": "five"}, "num_fewshot must be a whole number or empty, got 'five'"),
        ({"address": "paper.pdf"}, "an address must begin with https://, got 'paper.pdf'"),
        ({"source": ""}, "source must be stated, got ''"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(change: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write_published(tmp_path / "own.csv", {}, change)
    with pytest.raises(InputError, match=f"own.csv, line 3: {message}"):
        read_published(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source,adress\n", r"own\.csv, line 1: unknown column 'adress'\. Did you mean 'address'"),
        ("source,address\n", "line 1: each column must be there once, missing: table, kind"),
        (f"{','.join(COLUMNS)},source\n", "line 1: each column must be there once, missing: none"),
        ("", "line 1: each column must be there once"),
        (f"{','.join(COLUMNS)}\na,b\n", "line 2: a line needs 17 fields, got 2"),
        (f'{",".join(COLUMNS)}\n"a', "published numbers must be a CSV file in UTF-8"),
        ("\xff", "published numbers must be a CSV file in UTF-8"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        read_published(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"published numbers must be a CSV file in UTF-8, .*none\.csv is not"):
        read_published(tmp_path / "none.csv")


def published(**changes: Any) -> Published:
    typed = ROW | {"sparsity": 0.5, "num_fewshot": 5, "context_tokens": None, "value": 0.501}
    return Published(**(typed | changes))


def test_numbers_of_one_setting_are_one_run() -> None:
    [run] = as_runs([published(), published(metric="train_seconds", value=10.0, notes="timed")])
    assert run.metrics == {"exact_match_strict": 0.501, "train_seconds": 10.0}
    assert run.params["backend"] == "published"
    assert run.params["num_fewshot"] == "5"
    assert "context_tokens" not in run.params
    assert run.tags["notes"] == "with, a comma | timed"
    assert run.name.startswith("PUBLISHED (printed) LoRA, wanda, Mistral-7B-v0.3, gsm8k, sparsity 0.5, A paper")


def test_a_metric_that_is_published_twice_is_two_runs() -> None:
    runs = as_runs([published(), published(value=0.49)])
    assert sorted(run.metrics["exact_match_strict"] for run in runs) == [0.49, 0.501]
    assert len({run.identity for run in runs}) == 2


def test_every_number_is_in_exactly_one_run() -> None:
    rows = [row for row in load_published() if row.value is not None]
    runs = as_runs(load_published())
    assert sum(len(run.metrics) for run in runs) == len(rows) == 441
    assert len({run.identity for run in runs}) == len(runs)


def test_phoenix_waits_for_the_tasks_of_its_preset() -> None:
    from search_spaces.matrix import PHOENIX_TASKS

    waiting = {(row.model, row.task) for row in load_published() if row.value is None}
    assert waiting == {(model, task) for model in ("Meta-Llama-3-8B", "Mistral-7B-v0.3") for task in PHOENIX_TASKS}
    assert set(PHOENIX_TASKS) <= TASKS.keys()
