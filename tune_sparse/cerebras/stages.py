"""Where a training on a CS-3 is, and how long each part of it took, by the lines of the client's own log.

A line begins with its time: `2025-12-06 02:51:04,236 INFO:   Compile was successful!`. Time in the appliance's queue
counts as that, whatever waits there. Standard library only: the guard reads a log while it grows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

LINE = re.compile(r"\s*(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\s+[A-Z]+:\s*(.*)")
TIME = "%Y-%m-%d %H:%M:%S,%f"
BEFORE, QUEUE, COMPILING, PROGRAMMING = "before", "queue", "compiling", "programming"
TRAINING, SAVING, AFTER = "training", "saving", "after"
UNTIMED = (QUEUE, COMPILING)
"""The stages that a limit of a training's time leaves out: neither tells of the training."""
BEGINS = {
    "Compiling the model.": COMPILING,
    "Initiating a new compile wsjob": COMPILING,
    "Compile was successful!": PROGRAMMING,
    "Initiating a new execute wsjob": PROGRAMMING,
    "Beginning appliance run": TRAINING,
    "Saving checkpoint at step": SAVING,
    "Training completed successfully!": AFTER,
}
"""{a line's beginning: the stage that it begins}"""
SAVED = "Saved checkpoint"
"""Afterwards what was under way goes on."""
POLL = "Poll ingress"
QUEUEING = "current job status: Queueing"
CACHED = "Found existing cached compile"
ESTIMATE = re.compile(r"Compile estimated performance: ([\d.]+) samples/sec")


@dataclass
class Stages:
    """Seconds by stage, filled line by line."""

    stage: str = BEFORE
    """what is under way, queue aside"""
    is_queued: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    compiles: int = 0
    cached_compiles: int = 0
    """of the compiles, those that the appliance had already"""
    estimated_examples_per_second: float | None = None
    """the compiler's own estimate of the training: no measurement"""
    _before_saving: str = BEFORE
    _last: datetime | None = None

    @property
    def current(self) -> str:
        return QUEUE if self.is_queued else self.stage

    def add(self, lines: Iterable[str]) -> None:
        """Read further lines of the log."""
        for line in lines:
            if found := LINE.match(line):
                self._add(datetime.strptime(found[1], TIME), found[2])

    def _add(self, at: datetime, text: str) -> None:
        if self._last is not None and at > self._last:
            self.seconds[self.current] += (at - self._last).total_seconds()
        self._last = at
        if text.startswith(POLL):
            self.is_queued = QUEUEING in text
        begun = next((stage for begins, stage in BEGINS.items() if text.startswith(begins)), None)
        if text.startswith(SAVED):
            begun = self._before_saving
        if begun is not None:
            self._before_saving = self.stage
            self.stage, self.is_queued = begun, False
        self.compiles += text.startswith("Compile was successful!")
        self.cached_compiles += text.startswith(CACHED)
        if estimate := ESTIMATE.match(text):
            self.estimated_examples_per_second = float(estimate[1])

    def measured(self) -> dict[str, float | int | None]:
        """Return what is kept of a run that trained on a CS-3."""
        return {
            "queue_seconds": self.seconds[QUEUE],
            "compile_seconds": self.seconds[COMPILING],
            "programming_seconds": self.seconds[PROGRAMMING],
            "compiles": self.compiles,
            "cached_compiles": self.cached_compiles,
            "compiler_estimate_examples_per_second": self.estimated_examples_per_second,
        }

    @property
    def seconds_before_training(self) -> float:
        """Seconds in the queue, of compiling and of programming the wafer."""
        return sum(self.seconds[stage] for stage in (QUEUE, COMPILING, PROGRAMMING))


def read_stages(text: str) -> Stages:
    stages = Stages()
    stages.add(text.splitlines())
    return stages
