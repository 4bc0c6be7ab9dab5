"""One sweep at a time writes to a results folder."""

from __future__ import annotations

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
from tune_sparse.paths import read_json, write_json

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
"""A holder on another machine that has been silent for so long is dead."""


FIELDS = {"token", "host", "pid", "started", "command", "heartbeat"}


class Holder:
    """The right to write to a results folder: `with Holder(folder): ...`.

    Kept as `holder.json` with a heartbeat; a dead holder's right is taken over. Raises `InputError` if a live
    process holds it.
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
            "started": psutil.Process().create_time(),
            "command": " ".join(sys.argv),
        }
        self._thread = threading.Thread(target=self._keep_alive, name="holder-heartbeat", daemon=True)

    def __enter__(self) -> Holder:
        with self._lock():
            refuse_if_held(self.path.parent)
            self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        with self._lock():
            if self._is_mine():
                self.path.unlink()

    def _lock(self) -> FileLock:
        return FileLock(self.path.with_name(".holder.lock"))

    def _beat(self) -> None:
        write_json(self.path, self._me | {"heartbeat": time.time()})

    def _is_mine(self) -> bool:
        return is_held_with(self.path.parent, self.token)

    def _keep_alive(self) -> None:
        last = time.monotonic()
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                with self._lock():
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


def living_holder(folder: Path) -> dict[str, Any] | None:
    """Who writes to a results folder now: host, pid, command; None if nobody does."""
    holder = _read(folder / "holder.json")
    return holder if holder is not None and _is_alive(holder) else None


def refuse_if_held(folder: Path) -> None:
    """Raise `InputError` that says who holds the folder, if somebody alive does."""
    holder = living_holder(folder)
    if holder is not None:
        raise InputError(
            f"one sweep at a time writes to a results folder: {folder} is held by process {holder['pid']} on "
            f"{holder['host']} ({holder['command']}). Wait for it, stop it, or give another --results-dir."
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = read_json(path)
    except (FileNotFoundError, ValueError):
        return None
    return holder if isinstance(holder, dict) and holder.keys() >= FIELDS else None


def _is_alive(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return time.time() - holder["heartbeat"] < STALE_SECONDS
    try:
        process = psutil.Process(holder["pid"])
        same = abs(process.create_time() - holder["started"]) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
