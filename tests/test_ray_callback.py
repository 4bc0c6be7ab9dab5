from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from ray import cloudpickle
from ray.exceptions import RayTaskError

from tune_sparse.hang import Hang
from tune_sparse.ray_callback import _described, _error_of


def test_the_error_of_a_trial_is_the_one_that_its_worker_raised(tmp_path: Path) -> None:
    path = tmp_path / "error.pkl"
    raised = RayTaskError("step", "Traceback ...\nOSError: No space left on device", OSError("No space left on device"))
    path.write_bytes(cloudpickle.dumps(raised))
    error = _described(_error_of(SimpleNamespace(pickled_error_file=str(path))))
    assert error["class"] == "OSError"
    assert error["message"] == "OSError: No space left on device"
    assert "OSError: No space left on device" in error["traceback"]
    assert error["retryable"]


def test_a_trial_without_an_error_lost_its_worker(tmp_path: Path) -> None:
    for nowhere in (None, str(tmp_path / "error.pkl")):
        assert _described(_error_of(SimpleNamespace(pickled_error_file=nowhere)))["class"] == "WorkerLost"


def test_a_worker_that_hung_says_for_how_long_and_where() -> None:
    error = _described(RuntimeError("The actor died"), Hang("0:30:00", "matmul (x.py:7)", "Thread 0x1 ..."))
    assert error["message"] == "no progress for 0:30:00, in matmul (x.py:7)"
    assert (error["class"], error["traceback"], error["retryable"]) == ("Hang", "Thread 0x1 ...", True)
