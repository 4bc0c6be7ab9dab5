"""A run's model and examples as this node has them: as planned, or a refusal before anything is trained."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tune_sparse.config import Protocol
from tune_sparse.data.splits import Splits, calibration_text, fingerprint_splits, load_splits
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.identity import hash_json
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import Checkpoint, check_checkpoint


def load_planned_checkpoint(run: Run) -> Checkpoint:
    """The model, its files read once for each node. Raises `NotReadyError`, as the others here do."""
    what = f"the model {run.model_path}"
    with _needed(what):
        checkpoint = check_checkpoint(run.model_path)
    _check_same(what, run.model_fingerprint, checkpoint.fingerprint)
    return checkpoint


def load_planned_splits(run: Run, protocol: Protocol) -> list[Splits]:
    """The examples of the task, or of each task of a mixture."""
    what = f"the examples of {run.cell.task} in {run.data_dir}"
    with _needed(what):
        splits = [load_splits(task, _data_dir(run), protocol) for task in tasks_named(run.cell.task)]
    _check_same(what, run.data_fingerprint, fingerprint_splits(splits))
    return splits


def load_planned_calibration_text(run: Run) -> str:
    """The text that scores are calibrated on."""
    what = f"the text {run.protocol.calibration} in {run.data_dir}"
    with _needed(what):
        text = calibration_text(run.protocol.calibration, _data_dir(run))
    assert run.calibration_fingerprint is not None
    _check_same(what, run.calibration_fingerprint, hash_json(text))
    return text


def _data_dir(run: Run) -> Path | None:
    return Path(run.data_dir) if run.data_dir else None


@contextmanager
def _needed(what: str) -> Iterator[None]:
    """Raise `NotReadyError` for a bad input: it was not bad where the sweep was planned."""
    try:
        yield
    except InputError as error:
        raise NotReadyError(f"a run needs {what}, on every node; {socket.gethostname()} says: {error}") from error


def _check_same(what: str, planned: str, found: str) -> None:
    if found != planned:
        raise NotReadyError(
            f"a run needs {what} as it was planned, {planned[:12]}, on every node; {socket.gethostname()} has "
            f"{found[:12]}. Copy it there, or start the sweep again."
        )
