from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tune_sparse.errors import InputError
from tune_sparse.files import read_json, write_json
from tune_sparse.ledger import lease
from tune_sparse.ledger.lease import STALE_SECONDS, Holder, check_unlocked, shown_holder

HOLD = """
import sys, time
from pathlib import Path
from tune_sparse.ledger.lease import Holder
with Holder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def write_holder(folder: Path, **changes: Any) -> None:
    """A holder record of another machine."""
    record = {"token": "t", "host": "elsewhere", "pid": 1, "started": 0.0, "command": "sweep", "heartbeat": time.time()}
    write_json(folder / "holder.json", record | changes)


def enter(folder: Path) -> None:
    with Holder(folder):
        pass


def test_a_second_process_is_refused_with_pid_and_host(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    message = rf"{tmp_path} is held by process {other.pid} on {socket.gethostname()} \(.+\)\. Wait for it, stop it, or"
    with pytest.raises(InputError, match=message):
        enter(tmp_path)
    assert read_json(tmp_path / "holder.json")["pid"] == other.pid


def test_a_second_holder_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with Holder(tmp_path), pytest.raises(InputError, match=f"held by process {os.getpid()} "):
        enter(tmp_path)


def test_a_killed_holder_is_taken_over(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    with Holder(tmp_path):
        assert read_json(tmp_path / "holder.json")["pid"] == os.getpid()


def test_a_killed_holder_that_nobody_waited_for_is_taken_over(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    stat = Path(f"/proc/{other.pid}/stat")
    while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.01)
    with Holder(tmp_path):
        assert read_json(tmp_path / "holder.json")["pid"] == os.getpid()


def test_another_process_with_the_number_of_a_dead_holder_is_not_the_holder(tmp_path: Path) -> None:
    write_holder(tmp_path, host=socket.gethostname(), pid=os.getpid(), started=time.time() - 1e6)
    enter(tmp_path)


def test_release_removes_the_record_and_frees_the_folder(tmp_path: Path) -> None:
    for _ in range(2):
        enter(tmp_path)
        assert not (tmp_path / "holder.json").exists()


def test_an_error_in_the_block_releases_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), Holder(tmp_path):
        raise RuntimeError("boom")
    assert not (tmp_path / "holder.json").exists()


ELSEWHERE = """
import socket, sys, time
from pathlib import Path
real, off = time.time, float(sys.argv[2])
time.time = lambda: real() + off
socket.gethostname = lambda: "elsewhere"
from tune_sparse.ledger import lease
lease.HEARTBEAT_SECONDS = 0.1
with lease.Holder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
CLOCKS = pytest.mark.parametrize("off_seconds", [-3600, 0, 3600])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)


@CLOCKS
def test_a_live_holder_on_a_machine_with_another_clock_is_respected_and_a_dead_one_is_not(
    tmp_path: Path, impatient: None, off_seconds: int
) -> None:
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), str(off_seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"held by process {other.pid} on elsewhere"):
            enter(tmp_path)
        other.kill()
    started = time.monotonic()
    with Holder(tmp_path):
        assert read_json(tmp_path / "holder.json")["host"] == socket.gethostname()
    assert time.monotonic() - started >= 2.0


def test_what_a_dead_holder_left_is_waited_for_once(tmp_path: Path, impatient: None) -> None:
    write_holder(tmp_path)
    check_unlocked(tmp_path)
    started = time.monotonic()
    enter(tmp_path)
    assert time.monotonic() - started < 1


def test_a_holder_that_goes_while_it_is_watched_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_holder(tmp_path)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: (tmp_path / "holder.json").unlink())
    enter(tmp_path)


def test_setting_the_clock_of_this_machine_ends_no_holder(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says of the start of the machine moves with its clock, and of a process with it."""
    booted = lease.psutil.boot_time()
    monkeypatch.setattr("psutil.boot_time", lambda: booted + 600)
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 600)
    with pytest.raises(InputError, match=f"held by process {other.pid} "):
        enter(tmp_path)


def test_who_is_shown_is_asked_at_once(tmp_path: Path) -> None:
    assert shown_holder(tmp_path) is None
    write_holder(tmp_path, heartbeat=time.time() - STALE_SECONDS + 30)
    shown = shown_holder(tmp_path)
    assert shown is not None
    assert shown["host"] == "elsewhere"
    write_holder(tmp_path, heartbeat=time.time() - STALE_SECONDS - 1)
    assert shown_holder(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"pid": 1}'])
def test_a_holder_record_that_cannot_be_read_holds_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "holder.json").write_text(content)
    enter(tmp_path)


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    with Holder(tmp_path) as mine:
        first = read_json(tmp_path / "holder.json")["heartbeat"]
        deadline = time.monotonic() + 10
        while read_json(tmp_path / "holder.json")["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not mine.lost.is_set()


def test_a_holder_notices_that_it_lost_the_right_and_leaves_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    with Holder(tmp_path) as mine:
        write_holder(tmp_path, token="new")
        assert mine.lost.wait(10)
    assert read_json(tmp_path / "holder.json")["token"] == "new"
