"""doctor: this machine, and the nodes of a real Ray head."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_head import PATIENCE_SECONDS, Head, ray_head

from tune_sparse.cli import main
from tune_sparse.doctor import Check, machine
from tune_sparse.doctor import ray as of_ray


def by_what(findings: Any) -> dict[str, Check]:
    found = {finding.what: finding for finding in findings}
    assert all(finding.fix for finding in found.values() if not finding.is_well)
    assert not any(finding.fix for finding in found.values() if finding.is_well)
    return found


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    found = by_what(machine.examine(tmp_path / "results" / "not" / "there"))
    assert found.keys() == {"Python", "packages", "GPU", "CPU", "memory", "results", "cache", "toy models"}
    assert found["Python"].is_well
    assert str(tmp_path) in found["results"].found


def test_findings_are_printed_with_their_fixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tune_sparse.doctor.machine.LEAST_DISK_BYTES", 1e30)
    assert main(["doctor", "--results-dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"GB free at {tmp_path}\n     Free some, or give another --results-dir." in printed
    assert main(["doctor", "--json", "--results-dir", str(tmp_path)]) == 1
    values = json.loads(capsys.readouterr().out)
    assert [value["what"] for value in values if not value["is_well"]] == ["results", "cache"]


def test_every_line_of_the_constraints_is_a_tested_version() -> None:
    tested = machine.tested()
    assert len(tested) > 100
    assert tested["torch"] == "2.13.0"
    assert machine.check_packages("packages", {"torch": "2.13.0+cu130"}).is_well
    assert machine.check_packages("packages", tested).is_well


def test_other_versions_are_named() -> None:
    found = machine.check_packages("packages", {"torch": "2.12.1+cpu", "ray": machine.tested()["ray"]})
    assert not found.is_well
    assert found.found == "torch 2.12.1+cpu (2.13.0 was tested)"
    assert not machine.check_python("Python", "3.12.1").is_well
    assert not machine.check_python("Python", "3.1.1").is_well


def test_a_folder_that_cannot_be_written_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = by_what(machine.examine(tmp_path))["results"]
    assert (found.is_well, found.found) == (False, f"{tmp_path} cannot be written")


def test_a_cluster_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    [found] = of_ray.examine(tmp_path, [])
    assert (found.is_well, found.fix) == (False, "Set RAY_ADDRESS to HOST:PORT of the head.")


def test_a_cluster_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    [found] = of_ray.examine(tmp_path, [])
    assert time.monotonic() - started < 3
    assert found.found.startswith(f"nobody answers at {address}")


NODE = {
    "address": "10.0.0.7",
    "resources": {"CPU": 8.0, "GPU": 2.0, "CS3": 1.0, "memory": 64e9},
    "facts": {
        "host": "seven",
        "python": "3.10.1",
        "packages": {"torch": "2.0"},
        "sees_results": False,
        "models": {"tiny-llama": "not there", "./own": ""},
        "clock_seconds": -30.0,
    },
}


def test_a_node_that_differs_is_named_check_by_check() -> None:
    found = by_what(of_ray.check_node(NODE))
    assert found["node 10.0.0.7"].found == "seven: 8 CPU, 2 GPU, 1 CS3, 64 GB"
    assert "3.10.1, here 3.11" in found["node 10.0.0.7, Python"].found
    assert "torch 2.0 (here 2.13.0" in found["node 10.0.0.7, packages"].found
    assert "-30.0 s from here" in found["node 10.0.0.7, clock"].found
    failed = {what.partition(", ")[2] for what, finding in found.items() if not finding.is_well}
    assert failed == {"Python", "packages", "results", "tiny-llama", "clock"}


def test_a_node_that_says_nothing_is_a_fault() -> None:
    [found] = of_ray.check_node({"address": "a", "resources": {}, "error": "no answer"})
    assert not found.is_well


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


def examine(head: Head, *arguments: str, **environment: str) -> tuple[int, dict[str, Check]]:
    command = [sys.executable, "-m", "tune_sparse", "doctor", "--ray", "--json", *arguments]
    variables = head.environment | {"RAY_ADDRESS": head.gcs} | environment
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert run.stdout, run.stderr
    return run.returncode, by_what(Check(**value) for value in json.loads(run.stdout))


@pytest.mark.slow
def test_a_real_cluster_is_looked_at_node_by_node(head: Head, llama: Path, tmp_path: Path) -> None:
    _, found = examine(head, "--models", str(llama), "nonsense", "--results-dir", str(tmp_path))
    [node] = [what for what in found if what.startswith("node ") and "," not in what]
    assert found["Ray"].found == f"{head.gcs} lets us in: 1 nodes"
    assert "2 CPU" in found[node].found
    for what in ("Python", "packages", "results", str(llama), "clock"):
        assert found[f"{node}, {what}"].is_well, found
    assert not found[f"{node}, nonsense"].is_well
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_wrong_token_is_said_to_be_the_fault(head: Head, tmp_path: Path) -> None:
    status, found = examine(head, "--results-dir", str(tmp_path), RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert status == 1
    assert "its token is another one" in found["token"].found
