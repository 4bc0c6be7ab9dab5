"""Queue, compiling, programming and training are told apart by the lines of real logs.

COLD and CACHED: Llama-2-7B on ALCF's CS-3, batch sizes 128 and 32, 6 December 2025, from the public homework of a
participant of ALCF's training series. QUEUED: Llama-2-7B there on 11 July 2025, from seonghapark/AITestbeds on GitHub.
"""

from __future__ import annotations

import pytest

from tune_sparse.cerebras.stages import QUEUE, Stages, read_stages

COLD = """\
2025-12-06 01:53:15,657 INFO:   Saving checkpoint at step 0
2025-12-06 01:53:24,088 INFO:   Saved checkpoint model_dir_llama2_7b/checkpoint_0.mdl
2025-12-06 01:53:32,832 INFO:   Compiling the model. This may take a few minutes.
2025-12-06 01:53:33,860 INFO:   Initiating a new compile wsjob against the cluster server.
2025-12-06 01:53:53,881 INFO:   Poll ingress status: Waiting for all Coordinator pods to be running, current \
running: 0/1.
2025-12-06 01:54:23,017 INFO:   Gradient accumulation trying micro batch size 4...
2025-12-06 02:45:59,387 INFO:   Compile estimated performance: 34.1 samples/sec (34.1 samples/sec/system). Estimate \
may vary by 10-25% from actual runtime performance.
2025-12-06 02:51:04,236 INFO:   Compile was successful!
2025-12-06 02:51:04,237 INFO:   Programming Cerebras Wafer Scale Cluster for execution. This may take a few minutes.
2025-12-06 02:51:06,267 INFO:   Initiating a new execute wsjob against the cluster server.
2025-12-06 02:53:46,359 INFO:   Poll ingress status: Waiting for all Activation pods to be running, current running: \
19/20.
2025-12-06 02:58:54,173 INFO:   Device programming is complete
2025-12-06 02:58:56,972 INFO:   Beginning appliance run
2025-12-06 03:02:15,929 INFO:   | Train Device=CSX, Step=50, Loss=8.10329, Rate=32.52 samples/sec, GlobalRate=32.17 \
samples/sec, LoopTimeRemaining=0:10:03, TimeRemaining=0:10:03
2025-12-06 03:12:06,147 INFO:   Saving checkpoint at step 200
2025-12-06 03:22:50,236 INFO:   Saved checkpoint model_dir_llama2_7b/checkpoint_200.mdl
2025-12-06 03:23:04,336 INFO:   Training completed successfully!
"""
CACHED = """\
2025-12-06 03:26:46,495 INFO:   Compiling the model. This may take a few minutes.
2025-12-06 03:27:38,327 INFO:   Found existing cached compile with hash: "cs_356484260818439097"
2025-12-06 03:27:47,572 INFO:   Compile was successful!
2025-12-06 03:27:49,603 INFO:   Initiating a new execute wsjob against the cluster server.
2025-12-06 03:33:37,669 INFO:   Beginning appliance run
2025-12-06 03:37:22,159 INFO:   Saving checkpoint at step 200
"""
QUEUED = """\
2025-07-11 15:28:09,423 INFO:   Compiling the model. This may take a few minutes.
2025-07-11 15:28:12,047 INFO:   Initiating a new compile wsjob against the cluster server.
2025-07-11 15:28:22,066 INFO:   Poll ingress status: Waiting for job running, current job status: Queueing, msg: job \
queueing to be scheduled. Job queue status: current job is top of queue but likely blocked by running jobs, 1 compile \
job(s) running using 50Gi memory. For more information, please run 'csctl get jobs'
2025-07-11 17:28:24,945 INFO:   Poll ingress status: Waiting for job running, current job status: Queueing, msg: job \
queueing to be scheduled. Job queue status: current job is top of queue but likely blocked by running jobs, 1 compile \
job(s) running using 50Gi memory. For more information, please run 'csctl get jobs'.
2025-07-11 17:47:35,525 INFO:   Poll ingress status: Waiting for job running, current job status: Initializing, \
msg: job initializing with config generation/image pulling/....
2025-07-11 17:47:56,996 INFO:   Found existing cached compile with hash: "cs_16980171559998961274"
2025-07-11 17:48:11,313 INFO:   Compile was successful!
2025-07-11 17:48:11,484 INFO:   Initiating a new execute wsjob against the cluster server.
2025-07-11 17:53:33,940 INFO:   Beginning appliance run
"""


def minutes(seconds: float | int | None) -> float:
    assert seconds is not None
    return round(seconds / 60, 1)


def test_a_cold_compile_is_an_hour_of_compiling_and_not_of_training() -> None:
    stages = read_stages(COLD)
    found = stages.measured()
    assert minutes(found["compile_seconds"]) == 57.5
    assert minutes(found["programming_seconds"]) == 7.9
    assert found["queue_seconds"] == 0
    assert (found["compiles"], found["cached_compiles"]) == (1, 0)
    assert found["compiler_estimate_examples_per_second"] == 34.1
    assert minutes(stages.seconds["training"]) == 13.4
    assert minutes(stages.seconds["saving"]) == 10.9
    assert stages.seconds["before"] == pytest.approx(8.744)


def test_a_compile_that_the_appliance_had_is_told_from_a_cold_one() -> None:
    found = read_stages(CACHED).measured()
    assert minutes(found["compile_seconds"]) == 1.0
    assert minutes(found["programming_seconds"]) == 5.8
    assert (found["compiles"], found["cached_compiles"]) == (1, 1)
    assert found["compiler_estimate_examples_per_second"] is None


def test_time_in_the_queue_is_no_time_of_compiling() -> None:
    found = read_stages(QUEUED).measured()
    assert minutes(found["queue_seconds"]) == 139.2
    assert minutes(found["compile_seconds"]) == 0.8
    assert minutes(found["programming_seconds"]) == 5.4


def test_a_log_is_read_as_it_grows() -> None:
    stages, lines = Stages(), QUEUED.splitlines()
    seen = []
    for line in lines:
        stages.add([line])
        seen.append(stages.current)
    assert seen.count(QUEUE) == 2
    assert [stage for n, stage in enumerate(seen) if stage not in seen[:n]] == [
        *("compiling", "queue", "programming", "training"),
    ]
    assert stages.seconds == read_stages(QUEUED).seconds


def test_other_lines_are_passed_over() -> None:
    assert read_stages("Traceback\n  warn(\nE0711 18:04:02.654472867  609793 hpack_parser.cc:1234]\n") == Stages()
