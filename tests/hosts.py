"""Hosts on one machine, each with a network address, a name, processes and a /tmp of its own; Linux, as root.

A host is a network, a mount, a process and a name space of the kernel, wired to a switch in a space of its own. What
is not in its scratch folder is the disk that all hosts share. `ray start` in each makes them a cluster.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
import pytest

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379
TOOLS = ("ip", "nsenter", "unshare")
# The first process of a host: it reaps what others leave, as init does.
INIT = 'hostname "$1"; mount -t tmpfs tmpfs "$2"; echo up; while sleep 1; do :; done'


@dataclass
class Host:
    """One machine, as its processes see it."""

    name: str
    address: str
    network: str
    cable: str
    switch: str
    environment: Mapping[str, str]
    scratch: Path
    init: subprocess.Popen[str] | None = None
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def boot(self) -> None:
        """Nothing runs on it and its scratch folder is empty."""
        apart = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command = ["ip", "netns", "exec", self.network, *apart, "sh", "-c", INIT, "init", self.name, str(self.scratch)]
        self.init = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.init.stdout is not None
        assert self.init.stdout.readline() == "up\n"
        self.fix()

    def _first(self) -> psutil.Process:
        assert self.init is not None
        [first] = psutil.Process(self.init.pid).children()
        return first

    def start(self, command: Sequence[str], output: IO[str] | int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        """Run a command on this host; what it prints goes to `output`."""
        entered = ["nsenter", f"--target={self._first().pid}", "--net", "--uts", "--mount", "--pid", "--", *command]
        process = subprocess.Popen(entered, env=self.environment, stdout=output, stderr=output, text=True)
        self.started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """All that run on it."""
        ours = os.readlink(f"/proc/{self._first().pid}/ns/net")
        return [process for process in psutil.process_iter() if _find_network(process) == ours]

    def kill(self) -> None:
        """As if its power failed: it falls silent. The kernel kills all processes of a space whose first is gone."""
        if self.init is None:
            return
        self.cut()
        with suppress(psutil.NoSuchProcess, ValueError):
            self._first().kill()
        for process in (self.init, *self.started):
            process.wait()
        assert self.init.stdout is not None
        self.init.stdout.close()
        self.init, self.started = None, []

    def cut(self) -> None:
        """Its cable leads nowhere."""
        _ip("-n", self.switch, "link", "set", self.cable, "nomaster")

    def fix(self) -> None:
        _ip("-n", self.switch, "link", "set", self.cable, "master", "bridge")


@dataclass
class Cluster:
    """A Ray cluster of such hosts: the first is the head, and computes nothing; the others have one CPU each."""

    hosts: dict[str, Host]
    logs: Path

    @property
    def head(self) -> Host:
        return self.hosts["head"]

    def start_ray(self, name: str) -> subprocess.Popen[str]:
        """Returns at once; the process lasts as long as Ray does."""
        host = self.hosts[name]
        options = ["--disable-usage-stats", "--block", f"--node-ip-address={host.address}"]
        if name == "head":
            options += ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
            options += [f"--temp-dir={host.scratch / 'ray'}"]
        else:
            options += [f"--address={self.address}", "--num-cpus=1"]
        with (self.logs / f"{name}.log").open("a") as log:
            return host.start([RAY, "start", "--object-store-memory=100000000", *options], log)

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def wait_for(self, count: int) -> None:
        """Until so many hosts are alive in Ray's eyes."""
        command = [sys.executable, "-m", "tune_sparse.sweep.nodes", str(count), "120"]
        assert self.head.start(command).wait() == 0, f"see {self.logs}"


@contextmanager
def hosts(names: Sequence[str], environment: Mapping[str, str]) -> Iterator[dict[str, Host]]:
    """Hosts of these names on one switch, of which nothing is left afterwards. Skips the test where it must."""
    if os.geteuid() or any(shutil.which(tool) is None for tool in TOOLS):
        pytest.skip("hosts in namespaces need root and the tools " + ", ".join(TOOLS))
    mark = secrets.token_hex(3)
    switch = f"switch-{mark}"
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h-", dir="/tmp")))
        _space(stack, switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        yield {
            name: stack.enter_context(_host(name, f"10.77.0.{number}", switch, mark, environment, scratch))
            for number, name in enumerate(names, start=1)
        }


@contextmanager
def cluster(workers: Sequence[str], logs: Path, **settings: str) -> Iterator[Cluster]:
    """A head and workers with Ray running; `settings` are variables of all."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | settings
    environment |= {"RAY_ADDRESS": f"10.77.0.1:{PORT}", "PYTHONPATH": str(Path(__file__).parents[1])}
    with hosts(["head", *workers], environment) as found:
        made = Cluster(found, logs)
        for name in found:
            made.start_ray(name)
            if name == "head":
                made.wait_for(1)
        made.wait_for(len(found))
        yield made


@contextmanager
def _host(
    name: str, address: str, switch: str, mark: str, environment: Mapping[str, str], scratch: Path
) -> Iterator[Host]:
    network, cable = f"{name}-{mark}", f"to-{name}"[:15]
    with ExitStack() as stack:
        _space(stack, network)
        _ip("link", "add", "eth0", "netns", network, "type", "veth", "peer", "name", cable, "netns", switch)
        _ip("-n", switch, "link", "set", cable, "master", "bridge", "up")
        _ip("-n", network, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", network, "link", "set", device, "up")
        host = Host(name, address, network, cable, switch, {**environment, "TMPDIR": str(scratch)}, scratch)
        stack.callback(host.kill)
        host.boot()
        yield host


def _space(stack: ExitStack, name: str) -> None:
    """A network of its own."""
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"hosts need networks of their own: {made.stderr.strip()}")
    stack.callback(_ip, "netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _find_network(process: psutil.Process) -> str | None:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/net")
    except OSError:
        return None
