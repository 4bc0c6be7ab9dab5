"""Sweeps on a cluster whose hosts, networks, heads, workers and drivers are lost in mid-sweep.

Hosts are name spaces of the kernel (`hosts.py`). After each fault every finished run is still what it was, to the
byte, and in the end all runs are those of an undisturbed sweep, each once.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hosts import Cluster, Host, cluster
from patience import wait_until

from tune_sparse.result import Ledger

pytestmark = pytest.mark.slow

FEW = ["smoke", "--tasks", "boolq", "--set", "steps=60"]
RUNS = 7
FAST = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
"""Ray declares a silent host dead after seconds, not after most of a minute."""
Files = dict[str, tuple[int, bytes]]


@dataclass
class Sweep:
    """One sweep, started as a user does."""

    model: Path
    results: Path

    @property
    def command(self) -> list[str]:
        options = ["--models", str(self.model), "--results-dir", str(self.results)]
        return [sys.executable, "-m", "tune_sparse", "sweep", *FEW, *options]

    def start_on(self, host: Host) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            return host.start(self.command, log)

    @property
    def log(self) -> Path:
        return self.results.with_suffix(".log")

    def done(self) -> Files:
        """{finished run: when and what was written}"""
        ledger, found = Ledger(self.results), {}
        for path in (self.results / "runs").glob("[!.]*/result.json"):
            if ledger.is_done(path.parent.name):
                found[path.parent.name] = (path.stat().st_mtime_ns, path.read_bytes())
        return found

    def training(self) -> list[Path]:
        """Hidden folders of runs that train."""
        return sorted(path.parent for path in (self.results / "runs").glob(".*/metrics.jsonl") if path.stat().st_size)

    def metrics(self) -> dict[str, tuple[str, dict[str, object]]]:
        ledger = Ledger(self.results)
        records = {run_id: ledger.record(run_id) for run_id in self.done()}
        return {run_id: (record.identity, record.metrics) for run_id, record in records.items() if record}

    def wait_for_middle(self) -> Files:
        """Until some runs are done and all workers train; returns what is done."""
        wait_until(lambda: len(self.done()) >= 2 and len(self.training()) == 2)
        return self.done()

    def ends(self, process: subprocess.Popen[str]) -> int:
        wait_until(lambda: process.poll() is not None)
        return process.returncode


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """On this machine alone, without a cluster."""
    sweep = Sweep(llama, tmp_path_factory.mktemp("undisturbed") / "results")
    ended = subprocess.run(sweep.command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(sweep.done()) == RUNS
    return sweep


@pytest.fixture
def sweep(llama: Path, tmp_path: Path) -> Sweep:
    return Sweep(llama, tmp_path / "results")


@pytest.fixture
def nodes(undisturbed: Sweep, tmp_path: Path) -> Iterator[Cluster]:
    """A head and two hosts with a worker each."""
    with cluster(["one", "two"], tmp_path, **FAST) as made:
        yield made


def assert_undisturbed(sweep: Sweep, kept: Files, undisturbed: Sweep) -> None:
    """What was done stayed as it was, and nothing is missing, different or there twice."""
    done = sweep.done()
    assert {run_id: done[run_id] for run_id in kept} == kept
    assert sweep.metrics() == undisturbed.metrics()
    ledger = Ledger(sweep.results)
    assert not [p for p in (sweep.results / "set_aside").glob("*/result.json") if '"done"' in p.read_text()]
    assert not ledger.running()
    assert not list((sweep.results / "checkpoints").glob("*"))


def busy(host: Host) -> psutil.Process:
    """Its process that trains."""
    wait_until(lambda: bool(_training(host)))
    return _training(host)[0]


def _training(host: Host) -> list[psutil.Process]:
    return [p for p in host.processes() if "Trainable" in " ".join(p.cmdline())]


def kill_worker(nodes: Cluster) -> None:
    busy(nodes.hosts["one"]).kill()


def kill_host(nodes: Cluster) -> None:
    nodes.hosts["one"].kill()


def cut_off(nodes: Cluster) -> None:
    nodes.hosts["one"].cut()


@pytest.mark.parametrize("fault", [kill_worker, kill_host, cut_off])
def test_what_a_lost_worker_was_at_runs_again_and_the_sweep_ends_by_itself(
    nodes: Cluster, sweep: Sweep, undisturbed: Sweep, fault: Callable[[Cluster], None]
) -> None:
    process = sweep.start_on(nodes.head)
    kept = sweep.wait_for_middle()
    fault(nodes)
    known = sweep.training()
    seconds = wait_until(lambda: bool(list((sweep.results / "runs").glob("*/result.json")) and failed(sweep)))
    print(f"{fault.__name__}: seen as lost after {seconds:.1f} s")
    nodes.hosts["one"].mend() if fault is cut_off else None
    assert sweep.ends(process) == 0, sweep.log.read_text()
    assert_undisturbed(sweep, kept, undisturbed)
    assert known


def failed(sweep: Sweep) -> list[str]:
    ledger = Ledger(sweep.results)
    names = [path.name for path in (sweep.results / "runs").glob("[!.]*")]
    return [name for name in names if (record := ledger.record(name)) and record.status == "failed"]
