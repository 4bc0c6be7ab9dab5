"""A node without the model or the rows of a sweep, or with others."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from factories import finished, make_run, tiny_run, write_boolq

from trainables.failures import is_infrastructure
from trainables.inputs import load_planned_calibration_text, load_planned_checkpoint, load_planned_splits
from tune_sparse.config import Protocol
from tune_sparse.errors import NotReadyError
from tune_sparse.identity import hash_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import check_checkpoint

HOST = socket.gethostname()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_boolq(tmp_path / "rows")


@pytest.fixture
def run(llama: Path, rows: Path, tmp_path: Path) -> Run:
    """A run whose model and rows lie in folders of its own."""
    shutil.copytree(llama, tmp_path / "model")
    return tiny_run(tmp_path / "model", rows)


def test_what_was_planned_is_given(run: Run) -> None:
    assert load_planned_checkpoint(run) == check_checkpoint(run.model_path)
    [splits] = load_planned_splits(run, run.protocol)
    assert splits.fingerprint == run.data_fingerprint


def test_another_model_is_refused_with_both_fingerprints(run: Run) -> None:
    config = Path(run.model_path) / "config.json"
    config.write_text(config.read_text() + " ")
    found = check_checkpoint(run.model_path).fingerprint
    message = (
        f"a run needs the model {run.model_path} as it was planned, {run.model_fingerprint[:12]}, on every node; "
        f"{HOST} has {found[:12]}. Copy it there, or start the sweep again."
    )
    with pytest.raises(NotReadyError) as caught:
        load_planned_checkpoint(run)
    assert str(caught.value) == message


def test_a_missing_model_is_refused(run: Run) -> None:
    shutil.rmtree(run.model_path)
    with pytest.raises(NotReadyError, match=f"a run needs the model {run.model_path}, on every node; {HOST} says: "):
        load_planned_checkpoint(run)


def test_other_rows_are_refused(run: Run, rows: Path) -> None:
    write_boolq(rows, train=21)
    with pytest.raises(NotReadyError, match=rf"the rows of boolq in {rows} as it was planned, .+; {HOST} has "):
        load_planned_splits(run, run.protocol)


def test_missing_rows_are_refused(run: Run, rows: Path) -> None:
    (rows / "boolq" / "train.jsonl").unlink()
    with pytest.raises(NotReadyError, match=rf"{HOST} says: boolq needs the file {rows}/boolq/train.jsonl"):
        load_planned_splits(run, run.protocol)


def test_another_calibration_text_is_refused(rows: Path) -> None:
    text = rows / "wikitext2" / "train.txt"
    text.parent.mkdir()
    text.write_text("The tower was built in 1889 . " * 10)
    planned = make_run(protocol=Protocol(calibration="wikitext2"), data_dir=str(rows))
    read = load_planned_calibration_text(replace(planned, calibration_fingerprint=hash_json(text.read_text())))
    assert read == text.read_text()
    with pytest.raises(NotReadyError, match=f"the text wikitext2 in {rows} as it was planned"):
        load_planned_calibration_text(replace(planned, calibration_fingerprint="f" * 64))


@pytest.mark.parametrize("missing", ["model_fingerprint", "data_fingerprint"])
def test_a_run_is_neither_trained_nor_failed_for_good_there(run: Run, tmp_path: Path, missing: str) -> None:
    ledger = Ledger(tmp_path / "results")
    with pytest.raises(NotReadyError) as caught:
        finished(replace(run, **{missing: "f" * 64}), ledger)
    assert is_infrastructure(caught.value), "another node may have it"
    assert list((ledger.folder / "runs").iterdir()) == []
