"""A guarded program ends with whoever wanted it, whatever happens to them: with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from stand_in_csctl import jobs_with, write_csctl

from tune_sparse.cerebras import appliance, guard
from tune_sparse.cerebras.guard import Ended, SupervisedProcess, is_guarded, read_ended

LABEL = "tune_sparse_run=results-run"
JOB = jobs_with(LABEL)
NAME = "wsjob-ewhzngfg6rdjhw3s3k2wbh"
CANCELLED = appliance.Cancelled((NAME,), (NAME,))
SLEEPER = "import os, subprocess, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
WITH_CHILD = (
    "import os, subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "print(c.pid, flush=True); time.sleep(60)"
)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def start(
    folder: Path, program: str, label: str | None = None, timeout_seconds: float | None = None
) -> SupervisedProcess:
    folder.mkdir(exist_ok=True)
    return SupervisedProcess(folder, [sys.executable, "-c", program], dict(os.environ), label, timeout_seconds)


def ending(guarded: SupervisedProcess) -> Ended:
    until(lambda: guarded.ended() is not None)
    found = guarded.ended()
    assert found is not None
    return found


def find_child(folder: Path) -> int:
    until(lambda: (folder / "child.log").exists() and (folder / "child.log").read_text().strip() != "")
    return int((folder / "child.log").read_text().split()[0])


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def csctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_csctl(tmp_path / "bin", JOB)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_program_that_ends_well_leaves_its_job_alone(tmp_path: Path, csctl: Path) -> None:
    guarded = start(tmp_path / "job", "print('done')", LABEL)
    assert ending(guarded) == Ended("ended", 0, appliance.Cancelled())
    assert (tmp_path / "job" / "child.log").read_text() == "done\n"
    assert (csctl / "jobs").read_text() == JOB


def test_a_program_that_fails_has_its_job_cancelled(tmp_path: Path, csctl: Path) -> None:
    guarded = start(tmp_path / "job", "raise SystemExit(3)", LABEL)
    assert ending(guarded) == Ended("ended", 3, CANCELLED)
    assert NAME not in (csctl / "jobs").read_text()


def test_a_killed_child_has_its_job_cancelled(tmp_path: Path, csctl: Path) -> None:
    guarded = start(tmp_path / "job", SLEEPER, LABEL)
    os.kill(find_child(tmp_path / "job"), signal.SIGKILL)
    assert ending(guarded) == Ended("ended", -9, CANCELLED)


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path, csctl: Path, fast_end: None) -> None:
    guarded = start(tmp_path / "job", SLEEPER, LABEL, timeout_seconds=0.5)
    pid = find_child(tmp_path / "job")
    assert ending(guarded).why == "timeout"
    assert is_gone(pid)
    assert (csctl / "cancelled").read_text() == f"{NAME}\n"


def test_a_stop_ends_a_program_that_ignores_sigterm(tmp_path: Path, fast_end: None) -> None:
    guarded = start(tmp_path / "job", STUBBORN)
    pid = find_child(tmp_path / "job")
    guarded.stop()
    assert ending(guarded) == Ended("stopped", -9, appliance.Cancelled())
    assert is_gone(pid)


def test_children_of_the_program_end_with_it(tmp_path: Path, fast_end: None) -> None:
    guarded = start(tmp_path / "job", WITH_CHILD)
    grandchild = find_child(tmp_path / "job")
    guarded.stop()
    ending(guarded)
    until(lambda: is_gone(grandchild))


def test_a_killed_starter_takes_program_and_job_with_it(tmp_path: Path, csctl: Path, fast_end: None) -> None:
    job = tmp_path / "job"
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests');"
        "from test_cerebras_guard import start, SLEEPER, LABEL; import time;"
        f"kept = start(Path({str(job)!r}), SLEEPER, LABEL); time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    pid = find_child(job)
    starter.kill()
    starter.wait()
    until(lambda: read_ended(job) is not None)
    assert read_ended(job) == Ended("abandoned", -15, CANCELLED)
    assert is_gone(pid)
    until(lambda: not is_guarded(job))


def test_a_killed_guard_takes_the_program_with_it_and_is_noticed(tmp_path: Path) -> None:
    guarded = start(tmp_path / "job", SLEEPER)
    pid = find_child(tmp_path / "job")
    os.kill(int((tmp_path / "job" / "guard.pid").read_text()), signal.SIGKILL)
    until(lambda: is_gone(pid))
    until(lambda: not is_guarded(tmp_path / "job"))
    with pytest.raises(ConnectionError, match="the guard of job was lost"):
        guarded.ended()


def test_a_silent_controller_is_recorded_with_the_end(tmp_path: Path, csctl: Path) -> None:
    (csctl / "down").touch()
    guarded = start(tmp_path / "job", "raise SystemExit(1)", LABEL)
    problem = ending(guarded).cancelled.problem
    assert problem is not None
    assert "code = Unavailable" in problem


LOG = "import time; print('2025-07-11 15:28:1{n},000 INFO:   {text}', flush=True); "
QUEUEING = LOG.format(n=1, text="Poll ingress status: Waiting for job running, current job status: Queueing, msg: x")


def test_time_in_the_queue_is_left_out_of_the_limit(tmp_path: Path, fast_end: None) -> None:
    program = QUEUEING + "time.sleep(1.5); " + LOG.format(n=2, text="Beginning appliance run") + "time.sleep(60)"
    began = time.monotonic()
    assert ending(start(tmp_path / "job", program, timeout_seconds=0.8)).why == "timeout"
    assert time.monotonic() - began > 2


def test_the_clock_counts_what_is_neither_queue_nor_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    log = tmp_path / "child.log"
    log.touch()
    clock, seen = guard.TrainingClock(log), []
    for text in ("", "Compiling the model.", "Poll ingress status: x, current job status: Queueing", "Poll ingress x"):
        now[0] += 10
        with log.open("a") as stream:
            stream.write(f"2025-07-11 15:28:09,423 INFO:   {text}\n")
        seen.append(clock.tick())
    with log.open("a") as stream:
        stream.write("2025-07-11 15:28:09,423 INFO:   Compile was succ")
    now[0] += 10
    clock.tick()
    with log.open("a") as stream:
        stream.write("essful!\n")
    for _ in range(2):
        now[0] += 10
        seen.append(clock.tick())
    assert seen == [10, 20, 20, 20, 20, 30]


def test_the_client_s_own_records_of_a_failure_stay(tmp_path: Path) -> None:
    for name, program in (("failed", "raise SystemExit(1)"), ("well", "pass")):
        records = tmp_path / name / "model_dir" / "cerebras_logs" / "1"
        records.mkdir(parents=True)
        (records / "run_meta.json").write_text("{}")
        ending(start(tmp_path / name, program))
        assert not (tmp_path / name / "model_dir").exists()
    assert (tmp_path / "failed" / "cerebras_logs" / "1" / "run_meta.json").exists()
    assert not (tmp_path / "well" / "cerebras_logs").exists()


SAVED = "print('INFO:   Saved checkpoint m/checkpoint_5.mdl'); "


@pytest.mark.parametrize(
    ("end", "stays"),
    [("print('Socket closed'); raise SystemExit(1)", True), ("raise ValueError", False), ("pass", False)],
)
def test_a_checkpoint_stays_where_the_training_may_go_on(tmp_path: Path, end: str, stays: bool) -> None:
    model_dir = tmp_path / "job" / "model_dir"
    model_dir.mkdir(parents=True)
    for step in (5, 10):
        (model_dir / f"checkpoint_{step}.mdl").write_text(str(step))
    ending(start(tmp_path / "job", SAVED + end))
    kept = tmp_path / "job" / "restart.mdl"
    assert kept.exists() is stays
    assert not stays or (kept.read_text(), (tmp_path / "job" / "restart.json").read_text().split()) == (
        "5",
        ["{", '"step":', "5", "}"],
    )


def test_large_files_go_with_the_program_and_the_adapter_stays(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    for name in ("start.mdl", "trained.safetensors"):
        (job / name).touch()
    (job / "model_dir").mkdir()
    ending(start(job, "pass"))
    assert {"trained.safetensors", "child.log"} <= {path.name for path in job.iterdir()}
    assert not {"start.mdl", "model_dir"} & {path.name for path in job.iterdir()}


def test_a_command_that_cannot_be_run_is_an_end(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    guarded = SupervisedProcess(tmp_path / "job", [str(tmp_path / "nothing")], {})
    assert ending(guarded).returncode == 127
    assert "nothing" in (tmp_path / "job" / "child.log").read_text()


@pytest.fixture
def fast_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is another process: it reads the time between two signals from its environment's module."""
    monkeypatch.setenv(guard.STOP_VARIABLE, "0.3")
