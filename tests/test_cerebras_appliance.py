"""Jobs of the appliance found by label and cancelled, through a stand-in `csctl` that answers, is slow, or fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from factories import write_csctl

from tune_sparse.cerebras import appliance

MINE = "wsjob-aaa  2m  RUNNING  systemf0  me  name=x,tune_sparse=results-run1"
OTHERS = "wsjob-bbb  2m  RUNNING  systemf1  you  tune_sparse=other-run1"
ENDED = "wsjob-ccc  2d  SUCCEEDED  systemf0  me  tune_sparse=results-run2"


@pytest.fixture
def csctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_csctl(tmp_path / "bin", [MINE, OTHERS, ENDED])
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(appliance, "SECONDS", 1.0)
    return folder


def test_a_label_fits_the_appliance() -> None:
    label = appliance.job_label("r" * 64, "i" * 64)
    assert len(label) <= 63
    name = appliance.name_label("cerebras_" + "m" * 60 + "_s50_dense_12345678")
    assert len(name) <= 63
    assert name.endswith("_12345678")
    assert label.startswith(appliance.job_label("r" * 64, ""))


def test_only_the_jobs_of_the_label_are_cancelled(csctl: Path) -> None:
    assert appliance.cancel("tune_sparse=results-") == appliance.Cancelled(("wsjob-aaa",))
    assert (csctl / "jobs").read_text().splitlines() == [OTHERS, ENDED]
    assert appliance.cancel("tune_sparse=results-") == appliance.Cancelled()


def test_a_controller_that_fails_is_asked_again_and_reported(csctl: Path) -> None:
    (csctl / "down").touch()
    found = appliance.cancel("tune_sparse=results-")
    assert found.jobs == ()
    assert found.problem == "`csctl get jobs` failed with status 1: rpc error: code = Unavailable"


def test_a_controller_that_does_not_answer_holds_nobody_up(csctl: Path) -> None:
    (csctl / "delay").write_text("5")
    found = appliance.cancel("tune_sparse=results-")
    assert found.problem == "`csctl get jobs` did not answer in 1 s"


def test_without_a_controller_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = appliance.cancel("tune_sparse=x").problem
    assert problem == "csctl is not on PATH: it is on the user nodes of a CS-3"
