"""A real Ray head on this machine, with token authentication, and nodes that join it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PATIENCE_SECONDS = 240
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Head:
    """A Ray head with a job server, and the environment of those who may use it."""

    address: str
    """of the job server"""
    environment: dict[str, str]
    gcs: str
    """of the cluster: RAY_ADDRESS"""
    process: psutil.Process

    def ray(self, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
        command = [RAY, "job", arguments[0], "--address", self.address, *arguments[1:]]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    def submit(
        self, sweep: list[str], *options: str, program: Sequence[str] = ("tune-sparse",)
    ) -> subprocess.CompletedProcess[str]:
        return self.ray("submit", *options, "--", *program, "sweep", *sweep)

    def processes(self) -> list[psutil.Process]:
        return [*self.process.children(recursive=True), self.process]

    @property
    def driver_environment(self) -> dict[str, str]:
        """Of a command that joins this cluster."""
        return self.environment | {"RAY_ADDRESS": self.gcs}


@contextmanager
def ray_head(num_cpus: int = 2, **environment: str) -> Iterator[Head]:
    """Its processes, and the jobs that they start, see `environment`."""
    port, dashboard, agent = free_ports(3)
    everything = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
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
            "num-cpus": num_cpus,
            "temp-dir": folder,
        }
        command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        with _running(command, everything) as process:
            started = Head(f"http://127.0.0.1:{dashboard}", everything, f"127.0.0.1:{port}", process)
            wait_until(lambda: started.ray("list").returncode == 0)
            yield started


@contextmanager
def blind_node(head: Head, hidden: Path, cache: Path, num_cpus: int = 2) -> Iterator[psutil.Process]:
    """A node of the cluster that does not see the folder `hidden`: for its processes an empty one lies there.

    cache: what is the user's cache there. Skips the test where mounts cannot be made.
    """
    own_mounts = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*own_mounts, "mount", "-t", "tmpfs", "none", hidden], capture_output=True).returncode:
        pytest.skip("a node that does not see a folder needs the right to mount another one there")
    [agent] = free_ports(1)
    joins = [RAY, "start", "--block", f"--address={head.gcs}", f"--num-cpus={num_cpus}"]
    joins += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
    script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    command = [*own_mounts, "sh", "-c", script, "sh", str(hidden), *joins]
    with _running(command, head.environment | {"TUNE_SPARSE_CACHE": str(cache)}) as process:
        joined = [sys.executable, "-m", "tune_sparse.sweep.nodes", "2", str(PATIENCE_SECONDS)]
        subprocess.run(joined, env=head.driver_environment, check=True)
        yield process


@contextmanager
def _running(command: Sequence[str], environment: dict[str, str]) -> Iterator[psutil.Process]:
    """A process and its children, gone afterwards."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield psutil.Process(process.pid)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([*children, psutil.Process(process.pid)], timeout=30)
        for left in alive:
            left.kill()
        process.wait()


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
