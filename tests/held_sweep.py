"""A sweep whose runs wait in their midst, so that a test causes a fault when it likes, however fast the machine is.

python held_sweep.py HOLD DONE sweep ...    the commands of tune-sparse. While the file HOLD is there and DONE runs of
                                            the results folder are done, a run waits after its next step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import trainables.cell
from tune_sparse.cli import main

POLL_SECONDS = 0.05


def held(steps: Any, hold: Path, runs: Path, done: int) -> Iterator[Any]:
    """The steps of a run and what it returns; None while it waits, so that it can be stopped."""
    try:
        while True:
            try:
                step = next(steps)
            except StopIteration as stop:
                return stop.value
            yield step
            while step is not None and hold.exists() and len(list(runs.glob("[!.]*/result.json"))) >= done:
                time.sleep(POLL_SECONDS)
                yield None
    finally:
        steps.close()


class HeldCellTrainable(trainables.cell.CellTrainable):
    """Sent to workers by value, since this file is their `__main__`."""

    def _begin(self, config: Mapping[str, Any]) -> None:
        super()._begin(config)
        runs = Path(config["trial"]["results_dir"]) / "runs"
        self._steps = held(self._steps, HOLD, runs, DONE)


if __name__ == "__main__":
    HOLD, DONE = Path(sys.argv[1]), int(sys.argv[2])
    trainables.cell.CellTrainable = HeldCellTrainable  # type: ignore[misc]
    sys.exit(main(sys.argv[3:]))
