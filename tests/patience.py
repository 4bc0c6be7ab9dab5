"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 240.0


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> float:
    """Returns after how many seconds the condition held. An assertion fails if it never did."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not get there"
        time.sleep(0.1)
    return time.monotonic() - started
