"""A sweep is prepared once, and what it read then serves everything that follows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from factories import write_boolq, write_jsonl

from tune_sparse.cli import main
from tune_sparse.config import SweepConfig
from tune_sparse.data.tasks import task_named
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.sweep import driver
from tune_sparse.sweep.driver import run_sweep
from tune_sparse.sweep.examples import read_examples
from tune_sparse.sweep.preparation import prepare
from tune_sparse.sweep.wanted import WantedRuns

BOOLQ_ONCE = {"boolq/train.jsonl": 1, "boolq/validation.jsonl": 1}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """{file of examples: how often this process read it}"""
    counts: Counter[str] = Counter()
    read_text = Path.read_text

    def counted(path: Path, *arguments: Any, **options: Any) -> str:
        if path.suffix in (".jsonl", ".txt") and path.parent.parent.name == "data":
            counts[f"{path.parent.name}/{path.name}"] += 1
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", counted)
    return counts


def settings(llama: Path, folder: Path, **names: Any) -> dict[str, Any]:
    """Of a sweep of one training."""
    data_dir = write_boolq(folder / "data", train=40, validation=6)
    places = {"models": str(llama), "tasks": "boolq", "data_dir": str(data_dir), "results_dir": str(folder / "results")}
    cell = {"methods": "unstructured", "sparsities": 0.5, "modes": "sparse-to-sparse", "workers": 1}
    counts = {"n_train": 8, "n_selection": 4, "n_test": 4, "max_tokens": 64, "max_new_tokens": 4}
    training = {"steps": 1, "warmup_steps": 0, "global_batch_size": 4, "eval_every": 1}
    return places | cell | counts | training | names


def test_a_sweep_reads_each_file_of_examples_once(llama: Path, tmp_path: Path, reads: Counter[str]) -> None:
    result = run_sweep(prepare(SweepConfig.from_names(settings(llama, tmp_path))))
    assert (result.ran, result.is_complete) == (1, True)
    assert reads == BOOLQ_ONCE


def test_a_dry_run_with_pilots_reads_each_file_of_examples_once(
    llama: Path,
    tmp_path: Path,
    reads: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun: list[str] = []

    def begin(plan: Any, ledger: Ledger, wanted: WantedRuns, *_: Any) -> tuple[None, int]:
        begun.extend(run.run_id for run in wanted.missing)
        return None, 1

    monkeypatch.setattr(driver, "_tune", begin)
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(settings(llama, tmp_path)))
    assert main(["sweep", "smoke", "--config", str(file), "--dry-run", "--pilot", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == begun
    assert len(begun) == 1
    assert reads == BOOLQ_ONCE


@pytest.mark.parametrize("more", [{"num_fewshot": 2}, {"methods": "wanda", "calibration_tokens": 64}])
def test_few_shot_examples_and_calibration_read_nothing_more(
    llama: Path, tmp_path: Path, reads: Counter[str], more: dict[str, Any]
) -> None:
    found = read_examples(SweepConfig.from_names(settings(llama, tmp_path, **more)))
    assert found.counts["boolq"].selection == 4
    assert reads == BOOLQ_ONCE


def test_a_task_alone_and_in_a_mixture_and_a_text_that_calibrates_are_read_once(
    llama: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    texts = {"train": "a b\n", "valid": "c d\n", "test": "e f\n"}
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    for split, text in texts.items():
        (tmp_path / "data" / "wikitext2" / f"{split}.txt").write_text(text)
    svamp = [{"Body": f"{i} boys.", "Question": f"How many in {i}?", "Answer": str(i)} for i in range(20)]
    write_jsonl(tmp_path / "data" / "svamp" / "train.jsonl", svamp[:12])
    write_jsonl(tmp_path / "data" / "svamp" / "test.jsonl", svamp[12:])
    tasks = {"tasks": ["boolq", "boolq+svamp", "wikitext2"], "methods": "wanda", "calibration": "wikitext2"}
    found = read_examples(SweepConfig.from_names(settings(llama, tmp_path, **tasks)))
    assert len(set(found.fingerprints.values())) == 3
    assert found.calibration_text == task_named("wikitext2").joined(["a b\n"])
    assert set(reads.values()) == {1}
    assert len(reads) == 7
