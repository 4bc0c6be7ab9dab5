"""One sweep at a time writes to a results folder.

Whether a holder on another machine is alive is seen by its heartbeat changing: what two clocks say is never compared,
except to show it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from tune_sparse.errors import InputError
from tune_sparse.files import read_json, write_json

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
"""A holder on another machine that has been silent for so long is dead. A network disk may show an old file for 60."""
POLL_SECONDS = 0.5

FIELDS = {"token", "host", "pid", "started", "command", "heartbeat"}


class Holder:
    """The right to write to a results folder: `with Holder(folder): ...`.

    Kept as `holder.json` with a heartbeat; a dead holder's right is taken over. Raises `InputError` if a live
    process holds it, and may need `STALE_SECONDS` to see that one on another machine is dead.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "holder.json"
        self.lost = threading.Event()
        """Set when somebody else took over, because this process was suspended for too long."""
        self.token = uuid.uuid4().hex
        """Whoever finds it in `holder.json` sees the folder that this process holds."""
        self._released = threading.Event()
        self._me = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "command": " ".join(sys.argv),
        }
        self._thread = threading.Thread(target=self._keep_alive, name="holder-heartbeat", daemon=True)

    def __enter__(self) -> Holder:
        check_unlocked(self.path.parent)
        with _lock(self.path):
            if (faster := _read(self.path)) is not None:
                raise _held(self.path.parent, faster)
            self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        with _lock(self.path):
            if self._is_mine():
                self.path.unlink()

    def _beat(self) -> None:
        write_json(self.path, self._me | {"heartbeat": time.time()})

    def _is_mine(self) -> bool:
        return is_held_with(self.path.parent, self.token)

    def _keep_alive(self) -> None:
        last = time.monotonic()
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                with _lock(self.path):
                    if not self._is_mine():
                        self.lost.set()
                        return
                    self._beat()
                last = time.monotonic()
            except OSError:  # a full or lost disk: others may take over once we have been silent for too long
                if time.monotonic() - last > STALE_SECONDS:
                    self.lost.set()
                    return


def is_held_with(folder: Path, token: str) -> bool:
    """Whether this process sees the very folder that is held with `token`, at the same place."""
    current = _read(folder / "holder.json")
    return current is not None and current["token"] == token


def shown_holder(folder: Path) -> dict[str, Any] | None:
    """Who seems to write to a results folder: host, pid, command. At once, so by the clocks of both machines."""
    holder = _read(folder / "holder.json")
    if holder is None:
        return None
    seems = _runs_here(holder) if _is_here(holder) else time.time() - holder["heartbeat"] < STALE_SECONDS
    return holder if seems else None


def check_unlocked(folder: Path) -> None:
    """Raise `InputError` that says who holds the folder, if somebody alive does. What a dead holder left is removed."""
    path = folder / "holder.json"
    seen = _read(path)
    if seen is None:
        return
    living = _living(path, seen)
    if living is not None:
        raise _held(folder, living)
    with _lock(path):
        if _read(path) == seen:
            path.unlink()


def _held(folder: Path, holder: dict[str, Any]) -> InputError:
    return InputError(
        f"one sweep at a time writes to a results folder: {folder} is held by process {holder['pid']} on "
        f"{holder['host']} ({holder['command']}). Wait for it, stop it, or give another --results-dir."
    )


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(".holder.lock"))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = read_json(path)
    except (FileNotFoundError, ValueError):
        return None
    return holder if isinstance(holder, dict) and holder.keys() >= FIELDS else None


def _is_here(holder: dict[str, Any]) -> bool:
    return bool(holder["host"] == socket.gethostname())


def _living(path: Path, seen: dict[str, Any]) -> dict[str, Any] | None:
    """Who holds a folder, or None if that is dead or gone: of this machine by its processes, of another one by whether
    its record changes within `STALE_SECONDS`."""
    if _is_here(seen):
        return seen if _runs_here(seen) else None
    logger.info(
        "%s is held by process %s on %s; waiting up to %g s to see whether it is alive",
        *(path.parent, seen["pid"], seen["host"], STALE_SECONDS),
    )
    until = time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(POLL_SECONDS)
        current = _read(path)
        if current != seen:
            return current
    return None


def _runs_here(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(holder["pid"])
        same = abs(_started(holder["pid"]) - holder["started"]) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _started(pid: int) -> float:
    """Seconds from the start of this machine to that of a process: setting the clock does not change them."""
    booted = psutil.boot_time()
    return psutil.Process(pid).create_time() - booted
