"""`ray job submit` to a real Ray head on this machine, with token authentication."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tune_sparse.result import Ledger

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 240
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


@dataclass
class Head:
    """A Ray head with a job server, and the environment of those who may use it."""

    address: str
    environment: dict[str, str]

    def ray(self, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
        command = [RAY, "job", arguments[0], "--address", self.address, *arguments[1:]]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    def submit(self, sweep: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        return self.ray("submit", *options, "--", "tune-sparse", "sweep", *sweep)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, dashboard, agent = free_ports(3)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # Ray's sockets need a short path
        options = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "num-cpus": 2,
            "temp-dir": folder,
        }
        command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = Head(f"http://127.0.0.1:{dashboard}", environment)
        try:
            wait_until(lambda: started.ray("list").returncode == 0)
            yield started
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs([*children, psutil.Process(process.pid)], timeout=30)
            for left in alive:
                left.kill()
            process.wait()


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.2)


def metrics_in(results: Path) -> dict[str, dict[str, object]]:
    ledger = Ledger(results)
    names = [path.name for path in (results / "runs").glob("[!.]*")]
    return {name: record.metrics for name in names if (record := ledger.record(name)) and record.status == "done"}


def test_a_submitted_sweep_that_is_stopped_and_submitted_again_ends_as_an_undisturbed_one(
    head: Head, llama: Path, tmp_path: Path
) -> None:
    sweep = ["smoke", "--models", str(llama)]
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    ended = head.submit([*sweep, "--results-dir", str(undisturbed)])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert any("24 cells: 24 done" in line for line in lines)
    assert not any("\r" in line or "\x1b[2K" in line for line in lines)

    again = [*sweep, "--results-dir", str(stopped)]
    sent = head.submit(again, "--no-wait", "--submission-id", "first")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    wait_until(lambda: len(metrics_in(stopped)) >= 3)
    assert head.ray("stop", "first").returncode == 0
    assert "was stopped" in head.ray("status", "first").stdout
    done = metrics_in(stopped)
    assert len(done) < 14
    log = head.ray("logs", "first").stdout
    assert re.search(r"interrupted by SIGTERM: \d+ done, 0 failed, \d+ left", log), log

    ended = head.submit(again)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"running {14 - len(done)} of 14 trainings" in ended.stdout
    assert metrics_in(stopped) == metrics_in(undisturbed)


def test_a_sweep_that_is_not_complete_fails_its_job_and_says_why_on_the_last_line(
    head: Head, llama: Path, tmp_path: Path
) -> None:
    sweep = ["smoke", "--models", str(llama), "--sparsities", "0", "--tasks", "boolq", "--results-dir", str(tmp_path)]
    ended = head.submit([*sweep, "--set", "learning_rate=1e30", "max_grad_norm=1e30"])
    assert ended.returncode == 1
    said = [line for line in ended.stdout.splitlines() if line.startswith("tune-sparse:")]
    assert "0 done, 1 failed" in said[-1]


def test_a_wrong_token_is_refused(head: Head) -> None:
    refused = head.ray("list", token=secrets.token_hex(32))
    assert refused.returncode != 0
    assert re.search("token|[Uu]nauthenticated|403|401", refused.stdout + refused.stderr)


def test_the_job_server_listens_on_loopback(head: Head) -> None:
    port = int(head.address.rpartition(":")[2])
    [listening] = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    assert listening.laddr.ip == "127.0.0.1"
