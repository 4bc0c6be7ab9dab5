"""The tries of one training on Cerebras: how long to wait before the next, and the checkpoint from which it goes on.

`lost.json` in the job's folder counts the tries that were lost; what a lost one left is in `restart.mdl`, with its step
in `restart.json`, and in the lines of `metrics.jsonl` up to that step.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from tune_sparse.cerebras.guard import RESTART_FILES, keep_checkpoint
from tune_sparse.files import read_json, write_json, write_text

WAIT_SECONDS = 30.0
"""After the first lost try; twice as long after each further one."""
LONGEST_WAIT_SECONDS = 900.0
KEPT = (*RESTART_FILES, "lost.json", "metrics.jsonl")


def prepare_try(folder: Path) -> dict[str, Any] | None:
    """Clear a job's folder for another try; returns the checkpoint, and its step, from which that goes on, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_checkpoint(folder)
    restart = _restart(folder)
    kept = KEPT if restart else ("lost.json",)
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if restart:
        _cut_metrics(folder / "metrics.jsonl", restart["step"])
    return restart


def _restart(folder: Path) -> dict[str, Any] | None:
    checkpoint = folder / "restart.mdl"
    if not (checkpoint.exists() and (folder / "restart.json").exists() and (folder / "metrics.jsonl").exists()):
        return None
    return {"checkpoint": str(checkpoint.resolve()), **read_json(folder / "restart.json")}


def _cut_metrics(path: Path, step: int) -> None:
    """Leave the whole lines of the steps until the checkpoint, in their order."""
    lines = path.read_text().split("\n")[:-1]
    write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))


def note_lost(folder: Path) -> None:
    """Count a try that was lost."""
    write_json(folder / "lost.json", {"tries": _lost(folder)["tries"] + 1, "at": time.time()})


def waiting_seconds(folder: Path) -> float:
    """Return how long the next try must still wait: no time where none was lost, or where that is long ago."""
    lost = _lost(folder)
    if not lost["tries"]:
        return 0.0
    wait = min(WAIT_SECONDS * 2 ** (lost["tries"] - 1), LONGEST_WAIT_SECONDS)
    return max(0.0, min(wait, lost["at"] + wait - time.time()))


def _lost(folder: Path) -> dict[str, Any]:
    path = folder / "lost.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {"tries": 0, "at": 0.0}
    return found
