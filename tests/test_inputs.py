"""A node without the model or the examples of a sweep, or with others."""

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
def data_dir(tmp_path: Path) -> Path:
    return write_boolq(tmp_path / "data")


@pytest.fixture
def run(llama: Path, data_dir: Path, tmp_path: Path) -> Run:
    """A run whose model and examples lie in folders of its own."""
    shutil.copytree(llama, tmp_path / "model")
    return tiny_run(tmp_path / "model", data_dir)


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


def test_other_examples_are_refused(run: Run, data_dir: Path) -> None:
    write_boolq(data_dir, train=21)
    with pytest.raises(NotReadyError, match=rf"the examples of boolq in {data_dir} as it was planned, .+; {HOST} has "):
        load_planned_splits(run, run.protocol)


def test_missing_examples_are_refused(run: Run, data_dir: Path) -> None:
    (data_dir / "boolq" / "train.jsonl").unlink()
    with pytest.raises(NotReadyError, match=rf"{HOST} says: boolq needs the file {data_dir}/boolq/train.jsonl"):
        load_planned_splits(run, run.protocol)


def test_another_calibration_text_is_refused(data_dir: Path) -> None:
    text = data_dir / "wikitext2" / "train.txt"
    text.parent.mkdir()
    text.write_text("The tower was built in 1889 . " * 10)
    planned = make_run(protocol=Protocol(calibration="wikitext2"), data_dir=str(data_dir))
    read = load_planned_calibration_text(replace(planned, calibration_fingerprint=hash_json(text.read_text())))
    assert read == text.read_text()
    with pytest.raises(NotReadyError, match=f"the text wikitext2 in {data_dir} as it was planned"):
        load_planned_calibration_text(replace(planned, calibration_fingerprint="f" * 64))


@pytest.mark.parametrize("missing", ["model_fingerprint", "data_fingerprint"])
def test_a_run_is_neither_trained_nor_failed_for_good_there(run: Run, tmp_path: Path, missing: str) -> None:
    ledger = Ledger(tmp_path / "results")
    with pytest.raises(NotReadyError) as caught:
        finished(replace(run, **{missing: "f" * 64}), ledger)
    assert is_infrastructure(caught.value), "another node may have it"
    assert list((ledger.folder / "runs").iterdir()) == []
