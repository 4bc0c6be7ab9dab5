"""A program that outlives whoever started it by seconds only: `python -m tune_sparse.cerebras.guard FOLDER`.

It runs the command of `FOLDER/guard.json` and ends it when a file `stop` appears, when its time is up, or when the
process that started the guard is gone (its end of the guard's standard input closes). Time in the appliance's queue and
of compiling, told by the command's log, does not count. A command that did not end well has its appliance job
cancelled, found by its label. `FOLDER/ended.json` says what happened. Standard library only.

Ray gives a trial three seconds when it stops, and ends a worker's direct children with it: the guard is neither.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tune_sparse.cerebras import appliance
from tune_sparse.cerebras.failures import ApplianceError, classify_failure, read_tail
from tune_sparse.cerebras.stages import UNTIMED, Stages
from tune_sparse.files import write_json

POLL_SECONDS = 0.1
STOP_VARIABLE = "TUNE_SPARSE_CEREBRAS_STOP_SECONDS"
STOP_SECONDS = float(os.environ.get(STOP_VARIABLE, "10"))
"""Between the stop file, SIGTERM and SIGKILL: time for the trainer to end its step."""
WORKING_FILES = (
    *("start.mdl", "resumed.mdl", "model_dir"),
    *("masks.safetensors", "weights.safetensors", "adapter_start.safetensors"),
)
"""Only a running training needs them. They are as large as the model, and gone when it has ended."""
RESTART_FILES = ("restart.mdl", "restart.json")
"""A checkpoint of a training that was lost, and its step."""
SAVED_CHECKPOINT = re.compile(r"Saved checkpoint (\S+checkpoint_(\d+)\.mdl)")
LOGS = "cerebras_logs"
"""The client's own records of a job in `model_dir`: job ids, compile report, performance. They stay after a failure."""
PACKAGE_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a guarded command ended."""

    why: str
    """ended by itself, stopped, timeout, or abandoned by who started it"""
    returncode: int
    cancelled: appliance.Cancelled


class SupervisedProcess:
    """A command under a guard, which ends it when this process is gone."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        variables: Mapping[str, str],
        label: str | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        """label: of the appliance's jobs to cancel, None where there is no appliance."""
        self.folder = folder
        own = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
        # What the guard inherits is not written down: secrets are among it.
        changed = {name: value for name, value in variables.items() if own.get(name) != value}
        job = {
            "command": [str(part) for part in command],
            "variables": changed,
            "unset": sorted({*own} - {*variables}),
        }
        write_json(folder / "guard.json", job | {"label": label, "timeout_seconds": timeout_seconds})
        starter = [sys.executable, "-m", "tune_sparse.cerebras.guard", str(folder.resolve())]
        with (folder / "guard.log").open("w") as log:
            self._process = subprocess.Popen(starter, stdin=subprocess.PIPE, stdout=log, stderr=log, env=own)
        self._process.wait()

    def ended(self) -> Ended | None:
        """How the command ended, or None while it runs. Raises `ConnectionError` if its guard was killed."""
        lost = not is_guarded(self.folder)  # asked first: what it wrote until then is found below
        found = read_ended(self.folder)
        if found is None and not lost:
            return None
        self._let_go()
        if found is None:
            raise ConnectionError(f"the guard of {self.folder.name} was lost, and its training with it")
        return found

    def stop(self) -> None:
        """Ask for the end, without waiting for it."""
        (self.folder / "stop").touch()
        self._let_go()

    def _let_go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()


def read_ended(folder: Path) -> Ended | None:
    try:
        found = json.loads((folder / "ended.json").read_text())
    except FileNotFoundError:
        return None
    of_label = found["cancelled"]
    cancelled = appliance.Cancelled(tuple(of_label["found"]), tuple(of_label["jobs"]), of_label["problem"])
    return Ended(found["why"], found["returncode"], cancelled)


def is_guarded(folder: Path) -> bool:
    """Whether a guard of this folder is alive on this machine."""
    try:
        pid = int((folder / "guard.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes() if Path("/proc").is_dir() else None
        os.kill(pid, 0)
    except (OSError, ValueError):
        return False
    return command is None or str(folder.resolve()).encode() in command


def main(folder: Path) -> None:
    job = json.loads((folder / "guard.json").read_text())
    (folder / "guard.pid").write_text("")
    if os.fork():
        _await_pid(folder)
        os._exit(0)
    os.setsid()
    (folder / "guard.pid").write_text(str(os.getpid()))
    with (folder / "child.log").open("a") as log:
        try:
            child = _started(job, log)
        except OSError as error:
            log.write(f"{error}\n")
            write_json(folder / "ended.json", asdict(Ended("ended", 127, appliance.Cancelled())))
            return
    why = _watch(child, folder, job["timeout_seconds"])
    failed = why != "ended" or child.returncode != 0
    cancelled = appliance.cancel(job["label"]) if failed and job["label"] else appliance.Cancelled()
    if failed:
        keep_logs(folder)
    if why in ("stopped", "abandoned") or (failed and _may_pass(folder, child.returncode)):
        keep_checkpoint(folder)
    else:
        remove_files(folder, RESTART_FILES)
    remove_files(folder, WORKING_FILES)
    write_json(folder / "ended.json", asdict(Ended(why, child.returncode, cancelled)))


def keep_logs(folder: Path) -> None:
    """Move the client's records of a job that failed out of the files that are removed; nothing of model size is."""
    found = folder / "model_dir" / LOGS
    if found.is_dir():
        shutil.rmtree(folder / LOGS, ignore_errors=True)
        shutil.move(found, folder / LOGS)


def keep_checkpoint(folder: Path) -> None:
    """Keep the last checkpoint that the log says was saved whole, so that the training goes on from it."""
    for path, step in reversed(SAVED_CHECKPOINT.findall(read_tail(folder / "child.log"))):
        saved = folder / "model_dir" / Path(path).name
        if saved.exists():
            saved.replace(folder / "restart.mdl")
            write_json(folder / "restart.json", {"step": int(step)})
            return


def _may_pass(folder: Path, returncode: int) -> bool:
    return isinstance(classify_failure(folder / "child.log", returncode), ApplianceError)


def remove_files(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _await_pid(folder: Path) -> None:
    while not (folder / "guard.pid").read_text():
        time.sleep(POLL_SECONDS / 10)


def _started(job: Mapping[str, Any], log: IO[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        job["command"],
        env={n: value for n, value in os.environ.items() if n not in job["unset"]} | job["variables"],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class TrainingClock:
    """Counts the seconds of a command, those of the stages `UNTIMED` in its growing log left out."""

    def __init__(self, log: Path) -> None:
        self._log, self._stages, self._read = log, Stages(), 0
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        """Count what passed since the last call; returns the seconds so far."""
        now = time.monotonic()
        if self._stages.current not in UNTIMED:
            self.seconds += now - self._last
        self._last = now
        with self._log.open("rb") as stream:
            stream.seek(self._read)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        self._stages.add(whole.decode(errors="replace").splitlines())
        return self.seconds


def _watch(child: subprocess.Popen[bytes], folder: Path, timeout_seconds: float | None) -> str:
    clock, limit = TrainingClock(folder / "child.log"), timeout_seconds or float("inf")
    why = "ended"
    while child.poll() is None:
        if (folder / "stop").exists():
            why = "stopped"
        elif clock.tick() > limit:
            why = "timeout"
        elif _is_abandoned():
            why = "abandoned"
        if why != "ended":
            _end(child, folder)
            return why
        time.sleep(POLL_SECONDS)
    _kill_group(child, signal.SIGKILL)  # what it may have left behind
    return why


def _is_abandoned() -> bool:
    """Whether the other end of standard input is closed: nothing is ever written there."""
    ready, _, _ = select.select([0], [], [], 0)
    return bool(ready) and not os.read(0, 1)


def _end(child: subprocess.Popen[bytes], folder: Path) -> None:
    """By the stop file, then SIGTERM, then SIGKILL."""
    (folder / "stop").touch()
    for number in _signals():
        try:
            child.wait(STOP_SECONDS)
            break
        except subprocess.TimeoutExpired:
            _kill_group(child, number)
    child.wait()
    _kill_group(child, signal.SIGKILL)


def _signals() -> Iterator[signal.Signals]:
    yield from (signal.SIGTERM, signal.SIGKILL)


def _kill_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
