"""The rungs that trainings reached, in order of arrival: facts, from which decisions to stop early follow again.

rungs.jsonl of a results folder: a line a rung, of every sweep and search. Its driver alone writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rung:
    """The value of a training after one of its steps, on selection examples."""

    run_id: str
    step: int
    by: str
    """loss or accuracy"""
    value: float


class RungJournal:
    """The rungs of a results folder. A line that a kill cut short is no rung: its training reports it again."""

    def __init__(self, results_dir: Path) -> None:
        self._path = results_dir / "rungs.jsonl"

    def read(self) -> Iterator[Rung]:
        if not self._path.exists():
            return
        for line in self._path.read_text("utf-8").splitlines():
            try:
                yield Rung(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue

    def append(self, rung: Rung) -> None:
        """Add a line, which is on disk when this returns."""
        with self._path.open("a+b") as stream:
            size = stream.tell()
            stream.seek(max(0, size - 1))
            begins = b"" if stream.read(1) in (b"", b"\n") else b"\n"
            stream.write(begins + json.dumps(asdict(rung)).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
