"""The records of masks that changed while a run trained: a line each, in a file beside its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DYNAMICS = "dynamics.jsonl"


def append_dynamics(folder: Path, line: Mapping[str, Any]) -> None:
    """Append one record, {flat name: value}, to those of a run."""
    with (folder / DYNAMICS).open("a") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")


def read_dynamics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in the order of their steps; none where it has no such file."""
    path = folder / DYNAMICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
