"""What a log says becomes the error that a user, and the retries, can act on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune_sparse.cerebras.failures import LOG_TAIL_BYTES, ApplianceError, DiskFullError, classify_failure
from tune_sparse.errors import RunError

PASSING = {
    "grpc._channel._InactiveRpcError: StatusCode.UNAVAILABLE": "appliance was unavailable",
    "ConnectionResetError: [Errno 104] Connection reset by peer": "connection to the appliance was reset",
    "cerebras.appliance.errors.ApplianceDeadlockError: stall": "came to a standstill",
    "WS_RT_GRPC_RELATED_ERROR": "the wafer's runtime lost a connection",
    "received http2 header with status: 502": "a gateway answered 502",
    "details = Socket closed": "was closed",
    "RuntimeError: Failed to connect to cluster. Unable to start workflow.": "could not be reached",
}
LASTING = {
    "RuntimeError: The Cerebras backend does not yet support `aten::_linalg_svd(Tensor A, bool x) -> (Tensor U)`": (
        "the compiler has no operation aten::_linalg_svd"
    ),
    "ClusterConfigError: config error: mgmt_address has no default value\nFailed to connect to cluster": (
        "no Cerebras cluster is known on this machine. Start the sweep on a user node of the CS-3"
    ),
    "1 validation error for X\n  [type=union_tag_invalid]": "Model Zoo refused the configuration",
    "ModuleNotFoundError: No module named 'cerebras.pytorch'": "lacks the module cerebras.pytorch",
    'Missing key(s) in state_dict: "model.lora_A"': "the converted checkpoint does not fit the model",
    "Version mismatch between client 2.9 and server 2.10": "is not that of the cluster",
}


def write_log(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "child.log"
    path.write_text(f"INFO: began\n{text}\n")
    return path


@pytest.mark.parametrize("text", PASSING)
def test_what_passes_may_be_tried_again(tmp_path: Path, text: str) -> None:
    from trainables.failures import is_infrastructure

    error = classify_failure(write_log(tmp_path, text), 1)
    assert isinstance(error, ApplianceError)
    assert PASSING[text] in str(error)
    assert str(tmp_path / "child.log") in str(error)
    assert is_infrastructure(error)


@pytest.mark.parametrize("text", LASTING)
def test_what_lasts_is_not_tried_again(tmp_path: Path, text: str) -> None:
    from trainables.failures import is_infrastructure

    error = classify_failure(write_log(tmp_path, text), 1)
    assert isinstance(error, RunError)
    assert LASTING[text] in str(error)
    assert not is_infrastructure(error)


@pytest.mark.parametrize("text", ["OSError: [Errno 122] Disk quota exceeded", "No space left on device"])
def test_a_full_disk_is_said_in_the_words_that_stop_a_sweep(tmp_path: Path, text: str) -> None:
    error = classify_failure(write_log(tmp_path, f"{text}\nSocket closed"), 1)
    assert isinstance(error, DiskFullError)
    assert text.rpartition("] ")[2] in str(error)


def test_a_cause_that_lasts_wins_over_what_followed_from_it(tmp_path: Path) -> None:
    error = classify_failure(write_log(tmp_path, "No module named 'h5py'\nSocket closed"), 1)
    assert isinstance(error, RunError)


def test_a_killed_program_may_be_tried_again(tmp_path: Path) -> None:
    assert isinstance(classify_failure(write_log(tmp_path, ""), -9), ApplianceError)
    assert isinstance(classify_failure(tmp_path / "nothing", -9), ApplianceError)


def test_an_unknown_end_shows_the_last_line_and_is_not_tried_again(tmp_path: Path) -> None:
    error = classify_failure(write_log(tmp_path, "ValueError: 7 is not a batch"), 1)
    assert isinstance(error, RunError)
    assert "status 1: ValueError: 7 is not a batch. See" in str(error)


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    error = classify_failure(write_log(tmp_path, "Socket closed\n" + "x" * LOG_TAIL_BYTES), 1)
    assert isinstance(error, RunError)
