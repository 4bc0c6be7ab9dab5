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
"""Of the time allowed: progress is noted no oftener, so that noting it costs nothing."""


@dataclass
class _Watch:
    seconds: float
    dump: TextIO
    noted: float = -math.inf


_watch: _Watch | None = None  # a process has one such timer


@contextmanager
def watched(dump: Path, seconds: float | None) -> Iterator[None]:
    """While the block runs, this process ends if it makes no `progress` for so many seconds; None: it may.

    `dump` is then where every thread stood, and else no more.
    """
    global _watch
    if seconds is None:
        yield
        return
    dump.parent.mkdir(parents=True, exist_ok=True)
    with dump.open("w") as stream:
        _watch = _Watch(seconds, stream)
        try:
            progress()
            yield
        finally:
            _watch = None
            faulthandler.cancel_dump_traceback_later()
    dump.unlink(missing_ok=True)


def progress() -> None:
    """Something was done, so the time begins anew. Free where nothing watches."""
    if _watch is None:
        return
    now = time.monotonic()
    if now - _watch.noted > NOTED_FRACTION * _watch.seconds:
        faulthandler.dump_traceback_later(_watch.seconds, exit=True, file=_watch.dump)
        _watch.noted = now


@dataclass(frozen=True)
class Hang:
    """What a process left that made no progress."""

    allowed: str
    """as hours, minutes and seconds"""
    where: str
    """the line that its main thread was at"""
    traceback: str
    """of all threads"""


def take_hang(dump: Path) -> Hang | None:
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
    return Hang(allowed[1], f"{where[3]} ({where[1]}:{where[2]})" if where else "unknown", text)
