"""The card of a merged checkpoint says what it is, and nothing that was not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from factories import done_record, finished, make_run, tiny_run, write_boolq

from tune_sparse.export.merge import merge_run
from tune_sparse.export.model_card import model_card
from tune_sparse.ledger.ledger import Ledger

REPORT = {"actual_sparsity": 0.5, "mask_sha256": "ab" * 32}
ORIGIN = {"mode": "sparse-to-dense", "base": "/models/a|b"}


def read_table(card: str) -> dict[str, str]:
    lines = [line.strip("|").split(" | ", 1) for line in card.splitlines() if line.startswith("| ")]
    return {name.strip(): value.strip() for name, value in lines if name.strip() not in ("", "---")}


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_a_run_has_sparsity_method_task_accuracy_and_data() -> None:
    run = make_run()
    card = model_card(ORIGIN, REPORT, run, done_record(run, accuracy=0.8, chance_accuracy=0.5))
    rows = read_table(card)
    assert rows["pruning method"] == "unstructured"
    assert rows["task"] == "boolq"
    assert rows["sparsity"] == "0.5000 of the pruned matrices, counted"
    assert rows["accuracy"] == "0.8 ± 0.03 (standard error), 200 examples"
    assert rows["accuracy before tuning"] == "0.5"
    assert rows["data"].startswith("synthetic examples; fingerprint dddd")
    assert rows["base model"] == "/models/a\\|b"
    assert front_matter(card)["base_model"] == "/models/a|b"
    assert "perplexity" not in rows


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    run = make_run(data_dir=str(tmp_path))
    rows = read_table(model_card(ORIGIN, REPORT, run, done_record(run, accuracy_before_tuning=None)))
    assert rows["accuracy before tuning"] == "not measured"
    assert rows["chance accuracy"] == "not measured"
    assert rows["data"].startswith("training examples with the fields of google/boolq of the Hugging Face Hub")


def test_the_card_of_an_adapter_alone_claims_no_accuracy() -> None:
    card = model_card(ORIGIN, REPORT, None, None)
    assert "accuracy" not in read_table(card)
    assert "This checkpoint was not scored when it was merged." in card


def test_a_merged_run_has_its_card(llama: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "results")
    run = tiny_run(llama, write_boolq(tmp_path / "data"), n_train=8, n_test=4)
    record = finished(run, ledger)
    merge_run(ledger, run.run_id, tmp_path / "merged")
    rows = read_table((tmp_path / "merged" / "README.md").read_text())
    assert rows["run"] == run.run_id
    assert rows["accuracy"].startswith(f"{record.metrics['accuracy']:.4g}")
