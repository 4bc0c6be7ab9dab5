"""Sweeps on a cluster whose hosts, networks, heads, workers and drivers are lost in mid-sweep.

Hosts are name spaces of the kernel (`hosts.py`). A fault comes when two runs are done and each worker is in the middle
of another one, where it waits until the test releases it. After each fault every finished run is still what it was, to
the byte, and in the end all runs are those of an undisturbed sweep, each once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from factories import done_record, make_cell, make_run, write_run
from hosts import Cluster, Host, cluster
from patience import PATIENCE_SECONDS, held_sweep, wait_until

from tune_sparse.files import read_json
from tune_sparse.ledger.ledger import Ledger

pytestmark = pytest.mark.slow

FEW = ["smoke", "--no-report", "--tasks", "boolq", "--data-dir", "synthetic", "--set", "steps=60"]
RUNS = 7
FAST = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
"""Ray declares a silent host dead after some ten seconds, not after most of a minute."""
Files = dict[str, tuple[int, bytes]]


@dataclass
class Sweep:
    """One sweep, started as a user does."""

    model: Path
    results: Path
    place: Path
    """for what the test itself writes"""

    @property
    def arguments(self) -> list[str]:
        return ["sweep", *FEW, "--models", str(self.model), "--results-dir", str(self.results)]

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "tune_sparse", *self.arguments]

    @property
    def hold(self) -> Path:
        return self.place / "hold"

    @property
    def held_command(self) -> list[str]:
        """The same sweep; once two runs are done, the others wait in their midst until they are released."""
        self.hold.touch()
        return [*held_sweep(self.hold, 2), *self.arguments]

    def start_on(self, host: Host, held: bool = False) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            return host.start(self.held_command if held else self.command, log)

    def release(self) -> None:
        self.hold.unlink()

    @property
    def log(self) -> Path:
        return self.place / "results.log"

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
    place = tmp_path_factory.mktemp("undisturbed")
    sweep = Sweep(llama, place / "results", place)
    ended = subprocess.run(sweep.command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(sweep.done()) == RUNS
    return sweep


@pytest.fixture
def sweep(llama: Path, tmp_path: Path) -> Sweep:
    return Sweep(llama, tmp_path / "results", tmp_path)


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
    process = sweep.start_on(nodes.head, held=True)
    kept = sweep.wait_for_middle()
    fault(nodes)
    seconds = wait_until(lambda: bool(failures(sweep)))
    print(f"{fault.__name__}: {failures(sweep)} after {seconds:.1f} s")
    if fault is cut_off:
        nodes.hosts["one"].fix()
    sweep.release()
    assert sweep.ends(process) == 0, sweep.log.read_text()
    assert_undisturbed(sweep, kept, undisturbed)


def test_a_short_cut_loses_nothing(nodes: Cluster, sweep: Sweep, undisturbed: Sweep) -> None:
    process = sweep.start_on(nodes.head, held=True)
    kept = sweep.wait_for_middle()
    nodes.hosts["one"].cut()
    time.sleep(3)
    nodes.hosts["one"].fix()
    sweep.release()
    assert sweep.ends(process) == 0, sweep.log.read_text()
    assert_undisturbed(sweep, kept, undisturbed)
    assert not (sweep.results / "set_aside").exists(), sweep.log.read_text()


def test_a_killed_driver_is_followed_by_one_on_another_host(nodes: Cluster, sweep: Sweep, undisturbed: Sweep) -> None:
    process = sweep.start_on(nodes.head, held=True)
    sweep.wait_for_middle()
    [driver] = psutil.Process(process.pid).children()
    driver.kill()
    process.wait()
    seconds = wait_until(lambda: not any(_training(host) for host in nodes.hosts.values()))
    print(f"killed driver: its workers ended within {seconds:.1f} s")
    kept = sweep.done()
    assert len(kept) < RUNS
    sweep.release()
    assert sweep.ends(sweep.start_on(nodes.hosts["two"])) == 0, sweep.log.read_text()
    assert f"running {RUNS - len(kept)} of {RUNS} trainings" in sweep.log.read_text()
    assert_undisturbed(sweep, kept, undisturbed)


def test_a_sweep_goes_on_after_its_head_was_killed_and_started_again(
    nodes: Cluster, sweep: Sweep, undisturbed: Sweep
) -> None:
    process = sweep.start_on(nodes.head, held=True)
    sweep.wait_for_middle()
    nodes.head.kill()
    assert process.returncode not in (0, None)
    rays = [host.started[0] for host in nodes.hosts.values() if host is not nodes.head]
    seconds = wait_until(lambda: all(ray.poll() is not None for ray in rays), 600)  # a silent peer is given minutes
    print(f"killed head: Ray ended on the other hosts after {seconds:.1f} s")
    kept = sweep.done()
    assert len(kept) < RUNS
    sweep.release()

    nodes.head.boot()
    for name in nodes.hosts:
        nodes.start_ray(name)
        if name == "head":
            nodes.wait_for(1)
    nodes.wait_for(len(nodes.hosts))
    assert sweep.ends(sweep.start_on(nodes.head)) == 0, sweep.log.read_text()
    assert f"running {RUNS - len(kept)} of {RUNS} trainings" in sweep.log.read_text()
    assert_undisturbed(sweep, kept, undisturbed)


HANGING = """
import ctypes, sys, time
from pathlib import Path
import trainables.cell
from tune_sparse.cli import main

def hang_in_python():
    time.sleep(600)
    yield

def hang_in_c():
    ctypes.PyDLL(None).sleep(600)  # the interpreter is not given back meanwhile
    yield

class Hanging(trainables.cell.CellTrainable):
    def step(self):
        mark = Path(ATTEMPTS) / self._result["run_id"]
        if not mark.exists():
            mark.touch()
            self._steps = (hang_in_c if "sparse-to-sparse" in mark.name else hang_in_python)()
        return super().step()

trainables.cell.CellTrainable = Hanging
sys.exit(main(sys.argv[1:]))
"""


def test_a_worker_that_hangs_is_ended_and_says_where(sweep: Sweep, undisturbed: Sweep, tmp_path: Path) -> None:
    """Some runs hang when they are first tried: in Python, or in C that holds the interpreter."""
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    for run_id in undisturbed.done():
        if "random" not in run_id:
            (attempts / run_id).touch()
    script = tmp_path / "hanging.py"
    script.write_text(HANGING.replace("ATTEMPTS", repr(str(attempts))))
    command = [sys.executable, str(script), *sweep.arguments, "--hang-seconds", "10"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_undisturbed(sweep, {}, undisturbed)
    errors = {path.parent.name: read_json(path)["error"] for path in sweep.results.glob("set_aside/*/result.json")}
    assert len(errors) == 2
    for run_id, error in errors.items():
        place = "hang_in_c" if "sparse-to-sparse" in run_id else "hang_in_python"
        assert error["class"] == "Hang"
        assert error["retryable"]
        assert re.fullmatch(rf"no progress for 0:00:10, in {place} \(.+hanging.py:\d+\)", error["message"])
        assert "in step" in error["traceback"]


@pytest.fixture
def breaking_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that turns read-only at its first error."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    image.touch()
    os.truncate(image, 200 << 20)
    made = subprocess.run(["mkfs.ext4", "-q", image], capture_output=True)
    if made.returncode or not _mounted(image, folder):
        pytest.skip("a disk that breaks needs ext4, loop devices and the right to mount them")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _mounted(image: Path, folder: Path) -> bool:
    options = ["-o", "loop,errors=remount-ro", str(image), str(folder)]
    return subprocess.run(["mount", *options], capture_output=True).returncode == 0


def break_disk(folder: Path) -> None:
    device = subprocess.check_output(["findmnt", "-no", "SOURCE", folder], text=True).strip()
    Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1")


def fix_disk(folder: Path, image: Path) -> None:
    subprocess.run(["umount", folder], check=True)
    subprocess.run(["e2fsck", "-fy", image], capture_output=True)
    assert _mounted(image, folder)


def test_what_is_done_outlives_a_disk_that_breaks_in_the_next_moment(breaking_disk: Path, tmp_path: Path) -> None:
    ledger, runs = Ledger(breaking_disk / "results"), [make_run(make_cell(seed=seed)) for seed in range(5)]
    for run in runs:
        write_run(ledger, run, done_record(run))
    break_disk(breaking_disk)
    with pytest.raises(OSError, match="Read-only file system"):
        write_run(ledger, make_run(), done_record(make_run()))
    fix_disk(breaking_disk, tmp_path / "image")
    assert all(ledger.record(run.run_id) == done_record(run) for run in runs)


def test_a_disk_that_turns_read_only_stops_the_sweep_and_the_rest_runs_once_it_is_fixed(
    llama: Path, breaking_disk: Path, undisturbed: Sweep, tmp_path: Path
) -> None:
    sweep = Sweep(llama, breaking_disk / "results", tmp_path)
    process = subprocess.Popen(sweep.held_command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept = sweep.wait_for_middle()
    break_disk(breaking_disk)
    sweep.release()
    started = time.monotonic()
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    print(f"read-only disk: the sweep ended after {time.monotonic() - started:.1f} s")
    assert process.returncode == 1, out + err
    assert "Read-only file system" in err.splitlines()[-1]
    assert "Traceback" not in err

    fix_disk(breaking_disk, tmp_path / "image")
    ended = subprocess.run(sweep.command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_undisturbed(sweep, kept, undisturbed)


def failures(sweep: Sweep) -> list[str]:
    """What is recorded of runs that failed and did not run again yet."""
    ledger = Ledger(sweep.results)
    records = [ledger.record(path.name) for path in (sweep.results / "runs").glob("[!.]*")]
    return [f"{r.error['class']}: {r.error['message'][:80]}" for r in records if r and r.error]
