"""Waiting for what other processes do, and making them wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_SECONDS = 240.0


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> float:
    """Returns after how many seconds the condition held. An assertion fails if it never did."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not get there"
        time.sleep(0.1)
    return time.monotonic() - started


def held_sweep(hold: Path, done: int) -> list[str]:
    """The beginning of a command, in place of `tune-sparse`: see `held_sweep.py`."""
    return [sys.executable, str(Path(__file__).with_name("held_sweep.py")), str(hold), str(done)]
