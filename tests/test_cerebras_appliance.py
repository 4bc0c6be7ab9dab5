"""Jobs of the appliance found by label and cancelled, through a stand-in `csctl` that answers, is slow, or fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from stand_in_csctl import TABLES, jobs_with, write_csctl

from tune_sparse.cerebras import appliance
from tune_sparse.cerebras.appliance import Cancelled, jobs_of_json, jobs_of_table

RESULTS = appliance.results_label("a" * 64)
NAMES = {
    "2023": "wsjob-eyjapwgnycahq9tus4w7id",
    "R2": "wsjob-thjj8zticwsylhppkbmjqe",
    "now": "wsjob-ewhzngfg6rdjhw3s3k2wbh",
    "namespaced": "wsjob-uzsr3ycihbnhmwgqo6odqp",
    "json": "wsjob-cc4ypvcbgcpwtgaydam5wz",
}


@pytest.fixture
def csctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_csctl(tmp_path / "bin", jobs_with(RESULTS))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(appliance, "SECONDS", 5.0)
    return folder


def test_labels_fit_the_appliance() -> None:
    labels = [appliance.run_label("r" * 64, "i" * 64), RESULTS, appliance.name_label("m" * 90 + "_s50_dense_12345678")]
    for label in labels:
        key, value = label.split("=")
        assert max(len(key), len(value)) <= 63
    assert labels[-1].endswith("_12345678")


@pytest.mark.parametrize("release", TABLES)
def test_every_release_s_list_is_read(csctl: Path, release: str) -> None:
    (csctl / "jobs").write_text(jobs_with(RESULTS, release))
    [job] = appliance.unfinished_jobs(RESULTS)
    assert job.name == NAMES[release]
    assert job.labels == ("name=llama2_7b", RESULTS)
    assert job.namespace == ("" if release in ("2023", "R2") else "job-operator")
    assert appliance.unfinished_jobs() == [job]
    assert appliance.unfinished_jobs(appliance.results_label("b" * 64)) == []


@pytest.mark.parametrize("release", TABLES)
def test_a_job_of_every_release_s_list_is_cancelled(csctl: Path, release: str) -> None:
    (csctl / "jobs").write_text(jobs_with(RESULTS, release))
    name = NAMES[release]
    assert appliance.cancel(RESULTS) == Cancelled((name,), (name,))
    assert (csctl / "cancelled").read_text() == f"{name}\n"
    assert appliance.cancel(RESULTS) == Cancelled()


def test_only_the_jobs_of_the_label_are_cancelled(csctl: Path) -> None:
    mine, others = jobs_with(RESULTS).splitlines(), jobs_with(RESULTS.replace("aaaa", "bbbb", 1)).splitlines()[1]
    ended = mine[1].replace("RUNNING  ", "SUCCEEDED").replace("wsjob-ewh", "wsjob-old")
    (csctl / "jobs").write_text("\n".join([*mine, others.replace("wsjob-ewh", "wsjob-oth"), ended]) + "\n")
    assert appliance.cancel(RESULTS).jobs == (NAMES["now"],)
    assert "cancel job wsjob-ewhzngfg6rdjhw3s3k2wbh --namespace job-operator" in (csctl / "asked").read_text()


def test_the_server_is_asked_for_exactly_one_label(csctl: Path) -> None:
    (csctl / "jobs").write_text(jobs_with(RESULTS, "json"))
    appliance.unfinished_jobs(RESULTS)
    assert (csctl / "asked").read_text() == f"get jobs -o json -l {RESULTS}\n"


@pytest.mark.parametrize("printed", ["", "No jobs.\n", "JOB STATE\nwsjob-a RUNNING\n"])
def test_a_list_that_is_not_understood_is_never_called_empty(csctl: Path, printed: str) -> None:
    (csctl / "jobs").write_text(printed)
    found = appliance.cancel(RESULTS)
    assert found.found == ()
    assert found.problem is not None
    assert "must have the columns NAME, PHASE, LABELS" in found.problem
    assert "others may be left" in found.summary()


def test_a_line_without_a_job_is_not_passed_over() -> None:
    table = jobs_with(RESULTS).replace("wsjob-ewhzngfg6rdjhw3s3k2wbh  compile", "weird                         compile")
    with pytest.raises(appliance.ApplianceUnreachableError, match="has no job and phase"):
        list(jobs_of_table(table))


def test_a_header_alone_is_an_empty_list() -> None:
    assert list(jobs_of_table(jobs_with(RESULTS).splitlines()[0])) == []


def test_a_long_list_in_several_messages_is_read_whole() -> None:
    text = jobs_with(RESULTS, "json")
    assert len(list(jobs_of_json(text + text))) == 2
    assert list(jobs_of_json("{}")) == []


@pytest.mark.parametrize("text", ["", "[]", '{"jobs": []}', '{"items": [{"meta": {}}]}', "nothing"])
def test_json_that_is_no_list_of_jobs_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(jobs_of_json(text))


def test_what_was_seen_is_said() -> None:
    assert Cancelled().summary() == "no unfinished job found"
    assert Cancelled(("a", "b"), ("a", "b")).summary() == "2 jobs found and cancelled"
    assert Cancelled(("a", "b"), ("a",), "down").summary() == "2 jobs found, 1 cancelled, others may be left: down"


def test_a_controller_that_fails_is_asked_again_and_reported(csctl: Path) -> None:
    (csctl / "down").touch()
    found = appliance.cancel(RESULTS)
    assert (found.found, found.jobs) == ((), ())
    command = f"csctl get jobs -o json -l {RESULTS}"
    assert found.problem == f"`{command}` failed with status 1: rpc error: code = Unavailable"


def test_a_controller_that_does_not_answer_holds_nobody_up(csctl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appliance, "SECONDS", 0.2)
    (csctl / "delay").write_text("5")
    problem = appliance.cancel(RESULTS).problem
    assert problem is not None
    assert problem.endswith("did not answer in 0.2 s")


def test_without_a_controller_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = appliance.cancel("tune_sparse=x").problem
    assert problem == "csctl is not on PATH: it is on the user nodes of a CS-3"
