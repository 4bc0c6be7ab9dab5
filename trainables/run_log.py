"""The log of one run: lines of text with the seconds since its start, and lines of metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_sparse.ledger.dynamics import append_dynamics
from tune_sparse.watchdog import heartbeat


class RunLog:
    """Writes `train.log` and `metrics.jsonl` of a run's folder. A line of text is a sign of life to the watchdog."""

    def __init__(self, folder: Path) -> None:
        self.started, self._folder = time.perf_counter(), folder
        self._text = (folder / "train.log").open("w", buffering=1)
        self._metrics = (folder / "metrics.jsonl").open("w", buffering=1)

    def __call__(self, text: str) -> None:
        heartbeat()
        self._text.write(f"{self.seconds():9.3f} {text}\n")

    def metrics(self, **values: float | int) -> None:
        self._metrics.write(json.dumps(values, allow_nan=False) + "\n")

    def dynamics(self, line: Mapping[str, Any]) -> None:
        """Append a record of masks that change to the run's `dynamics.jsonl`, which other runs do not have."""
        append_dynamics(self._folder, line)

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def close(self) -> None:
        self._text.close()
        self._metrics.close()
