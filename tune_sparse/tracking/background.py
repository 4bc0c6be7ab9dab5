"""MLflow kept up to date while something else goes on, which it neither slows nor stops."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import SweepRecord
from tune_sparse.net import check_listening, host_and_port
from tune_sparse.tracking.sync import Tracker, make_client

logger = logging.getLogger(__name__)

PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
"""Between two tries of a store that fails, doubled each time."""
AGAIN_SECONDS = 3.0
"""A store that fails is tried again for so long after the end."""
SERVER_SECONDS, FILE_SECONDS = 10.0, 60.0
"""The end waits for one answer so long. A database in a file is slow while it is made, but it is there."""
POLL_SECONDS = 0.05
HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's own tries last for minutes. What the user has set is left alone."""


class BackgroundTracker:
    """Tracks runs in a thread as they are added, and all that `work` fills when the block ends.

    A store that fails is tried again meanwhile, and when the block ends. It then delays the end by seconds at most and
    is reported once: `tune-sparse track` fills it later.
    """

    def __init__(self, ledger: LedgerReader, uri: str, work: Callable[[Tracker], object]) -> None:
        self._ledger, self._uri, self._fill = ledger, uri, work
        self._patience_seconds = SERVER_SECONDS if host_and_port(uri) else FILE_SECONDS
        self._added: queue.Queue[str | None] = queue.Queue()
        self._given_up = threading.Event()
        self._ended_at: float | None = None
        self._call_at: float | None = None
        """since when the store owes an answer"""
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)

    def add(self, run_id: str) -> None:
        self._added.put(run_id)

    def __enter__(self) -> BackgroundTracker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended_at = time.monotonic()
        self._added.put(None)
        while self._thread.is_alive() and self._silent_seconds() < self._patience_seconds:
            self._thread.join(POLL_SECONDS)
        self._given_up.set()
        if self._thread.is_alive() or self._failure:
            _warn_outdated(self._uri, self._failure or TimeoutError("it does not answer"))

    def _silent_seconds(self) -> float:
        """Since when, after the end, an answer has been waited for."""
        asked_at, ended_at = self._call_at, self._ended_at
        return 0.0 if asked_at is None or ended_at is None else time.monotonic() - max(asked_at, ended_at)

    def _is_over(self) -> bool:
        """Say whether it is too late for another try."""
        return self._ended_at is not None and time.monotonic() - self._ended_at > AGAIN_SECONDS

    def _work(self) -> None:
        # MLflow's imports wait for the first result, so that they do not slow the start of the workers.
        self._added.put(self._added.get())
        for name, value in HTTP_LIMITS.items():
            os.environ.setdefault(name, value)
        pause = PAUSE_SECONDS
        while True:
            try:
                self._follow()
            except Exception as error:
                if self._failure is None:
                    logger.info("MLflow at %s fails (%s); it is tried again.", self._uri, _first_line(error))
                self._failure = error
            else:
                self._failure = None
                return
            if self._is_over():
                return
            self._sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _follow(self) -> None:
        """Fill, then track what is added; once more when the block has ended."""
        self._call(check_listening, self._uri)
        tracker = Tracker(self._ledger, self._uri, _Watched(make_client(self._uri), self._call))
        while True:
            is_last = self._ended_at is not None
            tracker.fill(self._fill)
            if is_last:
                return
            while self._ended_at is None:
                run_id = self._added.get()
                if run_id is not None:
                    tracker.fill_run(run_id)

    def _call(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return what the store answers. While it does not, the end may give it up."""
        if self._given_up.is_set():
            raise TimeoutError("it was given up")
        self._call_at = self._call_at or time.monotonic()
        answer = call(*arguments, **named)
        self._call_at = None
        return answer

    def _sleep(self, seconds: float) -> None:
        """Shorter if the block ends."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._ended_at is None:
            time.sleep(POLL_SECONDS)
        time.sleep(POLL_SECONDS)


class _Watched:
    """A client, each of whose calls goes through `call`."""

    def __init__(self, client: Any, call: Callable[..., Any]) -> None:
        self._client, self._call = client, call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, getattr(self._client, name))


def track_search(ledger: Ledger, uri: str, search_id: str) -> None:
    """Bring MLflow up to date with one search; a store that is down is reported."""
    with BackgroundTracker(ledger, uri, lambda tracker: tracker.fill_search(ledger.folder / "searches" / search_id)):
        pass


def track_sweep(ledger: LedgerReader, uri: str, sweep: SweepRecord) -> BackgroundTracker:
    """Track a sweep while it goes on."""

    def fill(tracker: Tracker) -> None:
        tracker.fill_sweep(sweep)
        tracker.mark_chosen()

    return BackgroundTracker(ledger, uri, fill)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _warn_outdated(uri: str, error: Exception) -> None:
    logger.warning(
        "MLflow at %s is not up to date (%s). The ledger is; `tune-sparse track` fills MLflow later.",
        uri,
        _first_line(error),
    )
