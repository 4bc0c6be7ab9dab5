"""`ray job submit` to a real Ray head on this machine, with token authentication."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from patience import held_sweep
from ray_head import Head, ray_head, wait_until

from tune_sparse.ledger.ledger import Ledger

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


def metrics_in(results: Path) -> dict[str, dict[str, object]]:
    ledger = Ledger(results)
    names = [path.name for path in (results / "runs").glob("[!.]*")]
    return {name: record.metrics for name in names if (record := ledger.record(name)) and record.status == "done"}


def test_a_submitted_sweep_that_is_stopped_and_submitted_again_ends_as_an_undisturbed_one(
    head: Head, llama: Path, tmp_path: Path
) -> None:
    sweep = ["smoke", "--models", str(llama)]
    sweep += ["--data-dir", "synthetic"]
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    ended = head.submit([*sweep, "--results-dir", str(undisturbed)])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert any("24 cells: 24 done" in line for line in lines)
    assert not any("\r" in line or "\x1b[2K" in line for line in lines)

    again, hold = [*sweep, "--no-report", "--results-dir", str(stopped)], tmp_path / "hold"
    hold.touch()
    sent = head.submit(again, "--no-wait", "--submission-id", "first", program=held_sweep(hold, 3))
    assert sent.returncode == 0, sent.stdout + sent.stderr
    wait_until(lambda: len(metrics_in(stopped)) >= 3)
    assert head.ray("stop", "first").returncode == 0
    assert "was stopped" in head.ray("status", "first").stdout
    done = metrics_in(stopped)
    assert len(done) < 14
    log = head.ray("logs", "first").stdout
    assert re.search(r"interrupted by SIGTERM: \d+ done, 0 failed, \d+ left", log), log

    ended = head.submit(again)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"running {14 - len(done)} of 14 trainings" in ended.stdout
    assert metrics_in(stopped) == metrics_in(undisturbed)


def test_a_sweep_that_is_not_complete_fails_its_job_and_says_why_on_the_last_line(
    head: Head, llama: Path, tmp_path: Path
) -> None:
    sweep = ["smoke", "--models", str(llama), "--sparsities", "0", "--tasks", "boolq", "--results-dir", str(tmp_path)]
    sweep += ["--data-dir", "synthetic"]
    ended = head.submit([*sweep, "--set", "learning_rate=1e30", "max_grad_norm=1e30"])
    assert ended.returncode == 1
    printed = [line for line in ended.stdout.splitlines() if line.startswith("tune-sparse:")]
    assert "0 done, 1 failed" in printed[-1]


def test_a_wrong_token_is_refused(head: Head) -> None:
    refused = head.ray("list", token=secrets.token_hex(32))
    assert refused.returncode != 0
    assert re.search("token|[Uu]nauthenticated|403|401", refused.stdout + refused.stderr)


def test_the_job_server_listens_on_loopback(head: Head) -> None:
    port = int(head.address.rpartition(":")[2])
    [listening] = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    assert listening.laddr.ip == "127.0.0.1"
