"""What a log says becomes the error that a user, and the retries, can act on.

LOST_POD is the end of a run of Llama-2-7B on ALCF's CS-3, 11 July 2025, from seonghapark/AITestbeds on GitHub; the
texts about versions are those that cerebras_appliance 2.10.0 raises (utils/misc.py, cluster/client.py,
appliance_manager.py); the compile errors are of public runs on ALCF's CS-3.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tune_sparse.cerebras.failures import LOG_TAIL_BYTES, ApplianceError, DiskFullError, classify_failure
from tune_sparse.errors import RunError

LOST_POD = """\
2025-07-11 17:53:33,940 INFO:   Beginning appliance run
2025-07-11 18:04:19,669 ERROR:   Initiating shutdown sequence due to Appliance error: Ran into error while receiving \
tensor output_model_wise_params_norm for runtime iteration 10
2025-07-11 18:04:19,787 ERROR:   Job wsjob-7javbqdggsmrb44obfaqft failed due to: job has failed because total 1 \
replica(s) failed, first failed pods: [wsjob-7javbqdggsmrb44obfaqft-weight-3]
2025-07-11 18:04:23,132 INFO:   Processed 11264 training sample(s) in 9567.159426912 seconds.
Traceback (most recent call last):
  File "cerebras/appliance/appliance_client.py", line 1108, in _recv_output_stream
    for response in output_stream:
cerebras.appliance.errors.PicklableRpcError: gRPC Error:
  Status Code: StatusCode.INTERNAL
  Details:
COUT030 18:04:18 GMT

Deadline Exceeded


The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "run.py", line 27, in <module>
    run()
cerebras.appliance.errors.ApplianceUnknownError: Ran into error while receiving tensor
"""
COMPILE_ERROR = """\
cerebras.appliance.errors.ApplianceCompilationError: WSAP011 05:26:53 GMT  Compilation failed. See earlier messages \
for more information."""
PASSING = {
    LOST_POD: "the appliance lost wsjob-7javbqdggsmrb44obfaqft-weight-3, a part of the job",
    LOST_POD[LOST_POD.index("Traceback") :]: "did not answer in time",
    "cerebras.appliance.errors.ApplianceRuntimeServerError: ACT crashed": "a server of the appliance crashed",
    "cerebras.appliance.errors.ApplianceServiceInterrupted: aborted": "was interrupted",
    "cerebras.appliance.errors.ApplianceUnknownError: who knows": "the appliance failed: Unknown",
    "cerebras.appliance.errors.ClusterJobInitError: Compile job init failed": "could not begin the job",
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
    (
        "cerebras.appliance.errors.ApplianceVersionError: Client software is on semantic version 1.14.0 but "
        "COMPONENT_NAME_CLUSTER_SERVER is on semantic version 2.0.1."
    ): "does not go with that of the cluster",
    (
        "CLUSTER_SERVER has version: 2.9.0 but client has 2.10.0.\n"
        "In order to use this cluster, you must install 2.9.0 of the client."
    ): "does not go with that of the cluster",
    "Cluster management server version is out of date. Please install version: 2.10.0": "does not go with that of",
    COMPILE_ERROR: "the compiler refused the graph",
    "cerebras.appliance.errors.ApplianceRuntimeJobTimeoutError: Appliance job timer time out after 60s": "its limit",
    "cerebras.appliance.errors.ClusterJobCancelledByCsctl: job has been cancelled, canceled-by-csctl": "cancelled",
    "cerebras.appliance.errors.ClusterJobScheduleError: not enough": "the cluster cannot hold the job",
    "cerebras.appliance.errors.ApplianceNanError: NaN": "are not finite",
    "AssertionError: rank": "asserts what does not hold",
}
TRACEBACK = 'Traceback (most recent call last):\n  File "child.py", line 1\n'


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


def test_what_the_client_got_over_before_is_not_why_it_ended(tmp_path: Path) -> None:
    passed = f"{TRACEBACK}grpc._channel._InactiveRpcError: StatusCode.UNAVAILABLE, Socket closed\nINFO: trying again\n"
    compile_error = classify_failure(write_log(tmp_path, f"{passed}{TRACEBACK}{COMPILE_ERROR}"), 1)
    assert isinstance(compile_error, RunError)
    assert "the compiler refused the graph" in str(compile_error)
    unknown = classify_failure(write_log(tmp_path, f"{passed}{TRACEBACK}ValueError: 7 is not a batch"), 1)
    assert isinstance(unknown, RunError)
    assert "ValueError: 7 is not a batch" in str(unknown)


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
