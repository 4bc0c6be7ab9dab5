from __future__ import annotations

import io

import pytest
from factories import done_record, failed_record, make_cell, make_run
from rich.console import Console

from tune_sparse.sweep import progress
from tune_sparse.sweep.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (45, "45 s"),
        (89, "89 s"),
        (90, "1.5 min"),
        (720, "12 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (12_240, "3.4 h"),
        (172_800, "2 days"),
        (181_440, "2.1 days"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What progress writes, as in a job log."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **options: Console(**options | {"file": stream}))
    return stream


def test_a_job_log_has_a_first_and_a_last_line(log: io.StringIO) -> None:
    shown = Progress(total=4, done_before=2)
    with shown.shown(workers=2):
        for seed in (0, 1):
            run = make_run(make_cell(seed=seed))
            shown.started(run.run_id, "tiny boolq")
            shown.reported(run.run_id, 1, 2)
            shown.ended(done_record(run))
    lines = log.getvalue().splitlines()
    assert lines == ["running 2 of 4 trainings on 2 workers", "4/4 trainings, 0 failed, about 0 s left"]


def test_a_failed_run_is_named_at_once_with_its_reason_on_one_line(log: io.StringIO) -> None:
    shown = Progress(total=3, done_before=0)
    run = make_run(make_cell(model="a-model-with-a-name-that-is-longer-than-a-terminal-is-wide-" * 2))
    with shown.shown(workers=1):
        shown.ended(failed_record(run, "[red] loss is nan"))
    assert log.getvalue().splitlines()[1:] == [f"failed: {run.run_id}: RunError: [red] loss is nan"]
    assert shown.failed == 1


def test_a_plain_line_comes_after_a_while(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress(total=10, done_before=0)
    with shown.shown(workers=1):
        now += progress.LINE_SECONDS - 1
        shown.ended(done_record(make_run()))
        assert len(log.getvalue().splitlines()) == 1
        now += 6
        shown.ended(done_record(make_run()))
    assert log.getvalue().splitlines()[1:] == ["2/10 trainings, 0 failed, about 80 s left"]


def test_a_terminal_shows_bars_and_still_names_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **o: Console(**o | {"file": stream, "force_terminal": True, "width": 120})
    )
    shown, run = Progress(total=2, done_before=0), make_run()
    with shown.shown(workers=1):
        shown.started(run.run_id, "tiny boolq")
        shown.reported(run.run_id, 1, 2)
        shown.ended(failed_record(run))
        shown.ended(done_record(make_run(make_cell(seed=1))))
    assert f"failed: {run.run_id}: RunError: the loss is nan at step 7" in stream.getvalue().replace("\n", "")
    assert "2/2" in stream.getvalue()


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=1, done_before=0).shown(workers=1):
        pass
    captured = capsys.readouterr()
    assert captured.err == "running 1 of 1 trainings on 1 workers\n"
    assert captured.out == ""
