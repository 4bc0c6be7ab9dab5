"""A real Ray head on this machine, with token authentication, as the README says to start one."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

PATIENCE_SECONDS = 240
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def wait_until(condition: Callable[[], object], patience_seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + patience_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.2)


@dataclass
class Head:
    """A Ray head with a job server, and the environment of those who may use it."""

    address: str
    """of the job server"""
    gcs: str
    """of the cluster: RAY_ADDRESS"""
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def ray(self, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
        command = [RAY, "job", arguments[0], "--address", self.address, *arguments[1:]]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    def submit(self, sweep: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        return self.ray("submit", *options, "--", "tune-sparse", "sweep", *sweep)

    def processes(self) -> list[psutil.Process]:
        return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]


@contextmanager
def ray_head(**environment: str) -> Iterator[Head]:
    """Its processes, and the jobs that they start, see `environment`."""
    port, dashboard, agent = free_ports(3)
    everything = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **environment,
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
        process = subprocess.Popen(command, env=everything, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", everything, process)
        try:
            wait_until(lambda: head.ray("list").returncode == 0)
            yield head
        finally:
            processes = head.processes()
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(processes, timeout=30)
            for left in alive:
                left.kill()
            process.wait()
