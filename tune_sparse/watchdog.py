"""Ends a process that makes no progress, and says where it stood.

The interpreter's own timer does it, which runs in C: also where C code never gives the interpreter back.
"""

from __future__ import annotations

import faulthandler
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

NOTED_FRACTION = 0.01
"""The timer starts anew at most once in this fraction of the time allowed, so that heartbeats cost nothing."""


@dataclass
class _Watch:
    seconds: float
    dump: TextIO
    noted: float = -math.inf


_watch: _Watch | None = None  # a process has one such timer


@contextmanager
def watchdog(dump: Path, seconds: float | None) -> Iterator[None]:
    """End this process if the block makes no `heartbeat` for so many seconds; with None it may.

    `dump` then says where every thread stood; it is removed when the block ends.
    """
    global _watch
    if seconds is None:
        yield
        return
    dump.parent.mkdir(parents=True, exist_ok=True)
    with dump.open("w") as stream:
        _watch = _Watch(seconds, stream)
        try:
            heartbeat()
            yield
        finally:
            _watch = None
            faulthandler.cancel_dump_traceback_later()
    dump.unlink(missing_ok=True)


def heartbeat() -> None:
    """Start the time anew, since something was done. Does nothing where no watchdog is active."""
    if _watch is None:
        return
    now = time.monotonic()
    if now - _watch.noted > NOTED_FRACTION * _watch.seconds:
        faulthandler.dump_traceback_later(_watch.seconds, exit=True, file=_watch.dump)
        _watch.noted = now


@dataclass(frozen=True)
class HangReport:
    """The place where a process stood that its watchdog ended."""

    allowed: str
    """as hours, minutes and seconds"""
    where: str
    """the line that its main thread was at"""
    traceback: str
    """of all threads"""


def read_hang_report(dump: Path) -> HangReport | None:
    """Read and remove what an ended process left; None if it did not hang."""
    try:
        text = dump.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    dump.unlink(missing_ok=True)
    allowed = re.match(r"Timeout \((.+)\)!", text)
    if allowed is None:
        return None
    main = text.rpartition("Thread 0x")[2]  # the oldest thread is the last one
    where = re.search(r'File "(.+)", line (\d+) in (.+)', main)
    return HangReport(allowed[1], f"{where[3]} ({where[1]}:{where[2]})" if where else "unknown", text)
