from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tune_sparse.watchdog import heartbeat, read_hang_report, watchdog

HANGS = {
    "python": "import time\ndef stuck(): time.sleep(600)",
    # PyDLL does not give the interpreter back while the C function runs.
    "c": "import ctypes\ndef stuck(): ctypes.PyDLL(None).sleep(600)",
    "a thread holds what the main one waits for": (
        "import threading, time\nlock = threading.Lock()\n"
        "threading.Thread(target=lambda: (lock.acquire(), time.sleep(600)), daemon=True).start()\n"
        "time.sleep(0.1)\ndef stuck(): lock.acquire()"
    ),
}
SCRIPT = """
import sys
from pathlib import Path
from tune_sparse.watchdog import watchdog
{hang}
with watchdog(Path(sys.argv[1]), 0.5):
    stuck()
"""


@pytest.mark.parametrize("hang", HANGS)
def test_a_process_that_hangs_ends_and_says_where(tmp_path: Path, hang: str) -> None:
    dump = tmp_path / "folder" / "dump"
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", SCRIPT.format(hang=HANGS[hang]), str(dump)], timeout=60)
    assert ended.returncode == 1
    assert time.monotonic() - started >= 0.5
    found = read_hang_report(dump)
    assert found is not None
    assert found.allowed == "0:00:00.500000"
    assert found.where.startswith("stuck (<string>:")
    assert "in <module>" in found.traceback
    assert read_hang_report(dump) is None, "it is taken once"


def test_who_makes_progress_lives_and_leaves_nothing(tmp_path: Path) -> None:
    body = "    for _ in range(40):\n        time.sleep(0.05)\n        heartbeat()"
    script = "import sys, time\nfrom pathlib import Path\nfrom tune_sparse.watchdog import heartbeat, watchdog\n"
    script += f"with watchdog(Path(sys.argv[1]), 0.5):\n{body}\ntime.sleep(1)\n"
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "dump")], timeout=60)
    assert ended.returncode == 0, "2 s of steps, and 1 s after the watch"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_watched_without_a_limit(tmp_path: Path) -> None:
    with watchdog(tmp_path / "dump", None):
        heartbeat()
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_block_ends_the_watch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), watchdog(tmp_path / "dump", 0.2):
        raise ValueError("boom")
    time.sleep(0.4)
    assert read_hang_report(tmp_path / "dump") is None


def test_a_worker_that_was_killed_did_not_hang(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("")
    assert read_hang_report(tmp_path / "dump") is None
    assert not (tmp_path / "dump").exists()


def test_progress_is_free_where_nothing_watches_and_cheap_where_something_does(tmp_path: Path) -> None:
    def seconds() -> float:
        start = time.process_time()
        for _ in range(100_000):
            heartbeat()
        return (time.process_time() - start) / 100_000

    assert seconds() < 2e-6
    with watchdog(tmp_path / "dump", 60):
        assert seconds() < 4e-6
