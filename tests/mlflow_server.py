"""A real MLflow server before a real PostgreSQL, both of which can be killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from ray_head import free_ports, wait_until

UNPRIVILEGED = "nobody"
START_SECONDS = 600


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """A process and all that it started."""
    processes = list[psutil.Process]()
    with suppress(psutil.NoSuchProcess):
        processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)
    _, alive = psutil.wait_procs(processes, timeout=30)
    for one in alive:
        one.kill()
    process.wait()


@dataclass
class Postgres:
    """A database in a folder of an unprivileged user: PostgreSQL refuses root. It listens on a socket in the folder."""

    folder: Path
    binaries: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"postgresql://{UNPRIVILEGED}@/postgres?host={self.folder}"

    def _command(self, program: str, *arguments: str) -> list[str]:
        return ["runuser", "-u", UNPRIVILEGED, "--", str(self.binaries / program), *arguments]

    def make(self) -> None:
        shutil.chown(self.folder, UNPRIVILEGED)
        made = self._command("initdb", "-D", str(self.folder / "data"), "--auth=trust", "--no-sync")
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=self.folder)

    def start(self) -> None:
        options = ["-D", str(self.folder / "data"), "-k", str(self.folder), "-c", "listen_addresses="]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command("postgres", *options), stdout=log, stderr=log, cwd=self.folder
            )
        command = self._command("pg_isready", "-q", "-h", str(self.folder))
        wait_until(lambda: subprocess.run(command, cwd=self.folder).returncode == 0)

    def kill(self) -> None:
        assert self.process is not None
        end(self.process, signal.SIGKILL)


@dataclass
class MlflowServer:
    """`mlflow server` as docs/mlflow.md starts it."""

    folder: Path
    database: str
    port: int = field(default_factory=lambda: free_ports(1)[0])
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = {"host": "127.0.0.1", "port": self.port, "workers": 1, "artifacts-destination": self.folder / "files"}
        command = [sys.executable, "-m", "mlflow", "server", *(f"--{name}={value}" for name, value in options.items())]
        settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = os.environ | settings | {"MLFLOW_BACKEND_STORE_URI": self.database}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.folder)
        wait_until(self._answers, START_SECONDS)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        end(self.process, signal.SIGKILL)


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """Skips, saying so, where there is none."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'tune-sparse[postgres]'")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not versions:
        pytest.skip("PostgreSQL is not installed")
    if os.geteuid() != 0 or not shutil.which("runuser"):
        pytest.skip("PostgreSQL is started by an unprivileged user, which needs root and runuser")
    folder.mkdir()
    database = Postgres(folder, versions[-1].parent)
    database.make()
    database.start()
    try:
        yield database
    finally:
        assert database.process is not None
        end(database.process, signal.SIGINT)


@contextmanager
def mlflow_server(folder: Path, database: str) -> Iterator[MlflowServer]:
    folder.mkdir()
    server = MlflowServer(folder, database)
    server.start()
    try:
        yield server
    finally:
        assert server.process is not None
        end(server.process)
