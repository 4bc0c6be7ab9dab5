"""The peak of anonymous memory by stage: what is mapped from a file does not count."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from trainables.peak_memory import SAMPLE_SECONDS, STATM, PeakMemory, anonymous_bytes

MEGABYTES = 1 << 20
ROOM = 40 * MEGABYTES
"""What else the process may allocate or give back meanwhile."""

pytestmark = pytest.mark.skipif(not STATM.exists(), reason="the peak of a CPU's memory is read from Linux' /proc")


def test_a_peak_within_a_stage_is_seen_and_belongs_to_it_alone() -> None:
    with closing(PeakMemory()) as memory:
        memory.end("before")
        held = torch.ones(400 * MEGABYTES, dtype=torch.uint8)
        time.sleep(10 * SAMPLE_SECONDS)
        del held
        memory.end("within")
        memory.end("after")
    before, within, after = memory.by_stage.values()
    assert within - before > 400 * MEGABYTES - ROOM
    assert after - before < ROOM
    assert memory.bytes == max(memory.by_stage.values())
    assert memory.reserved_bytes is None


def test_pages_of_a_mapped_file_are_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(200 * MEGABYTES))
    before = anonymous_bytes()
    mapped = torch.from_file(str(path), size=200 * MEGABYTES, dtype=torch.uint8)
    assert int(mapped.max()) == 0
    assert anonymous_bytes() - before < ROOM


def test_where_nothing_is_known_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trainables.peak_memory.STATM", tmp_path / "absent")
    with closing(PeakMemory()) as memory:
        memory.end("train")
    assert (memory.by_stage, memory.bytes) == ({}, None)
