"""Tracking while a sweep goes on: stores that are down, come back, or never answer."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
from factories import done_record, make_cell, make_run, make_sweep, write_run
from mlflow.exceptions import MlflowException

from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import SweepRecord
from tune_sparse.tracking.background import BackgroundTracker, track_search, track_sweep
from tune_sparse.tracking.entries import RUN_TAG, SWEEP_TAG
from tune_sparse.tracking.sync import EXPERIMENT, default_uri, make_client

pytestmark = pytest.mark.xdist_group("machine")

RUNS = [make_run(make_cell(seed=seed)) for seed in range(3)]
LOGGER = "tune_sparse.tracking.background"
SERVER_SECONDS = 3.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end waits for an answer, and for another try, as briefly as can still be told from not at all."""
    monkeypatch.setattr("tune_sparse.tracking.background.SERVER_SECONDS", SERVER_SECONDS)
    monkeypatch.setattr("tune_sparse.tracking.background.AGAIN_SECONDS", 1.0)


@pytest.fixture
def sweep() -> SweepRecord:
    return make_sweep([run.cell for run in RUNS])


@pytest.fixture
def ledger(tmp_path: Path, sweep: SweepRecord, empty_store: Path) -> Ledger:
    """A sweep of which nothing has run, beside an empty store."""
    copy(empty_store, tmp_path)
    ledger = Ledger(tmp_path)
    ledger.write_sweep(sweep)
    return ledger


class Flaky:
    """A client of a store that can be switched off."""

    def __init__(self) -> None:
        self.is_down = False
        self.calls_when_down = 0
        self.calls_left: int | None = None
        """After so many it goes down by itself."""

    def make_client(self, uri: str) -> Any:
        self._client = make_client(uri)
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self.calls_left is not None:
                self.calls_left -= 1
                self.is_down |= self.calls_left < 0
            if self.is_down:
                self.calls_when_down += 1
                raise MlflowException("down\nand more lines")
            return getattr(self._client, name)(*arguments, **named)

        return call


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Flaky:
    found = Flaky()
    monkeypatch.setattr("tune_sparse.tracking.background.make_client", found.make_client)
    monkeypatch.setattr("tune_sparse.tracking.background.PAUSE_SECONDS", 0.1)
    monkeypatch.setattr("tune_sparse.tracking.background.FILE_SECONDS", 1.0)
    return found


def record(ledger: Ledger, tracker: BackgroundTracker, *runs: Any) -> None:
    for run in runs:
        write_run(ledger, run, done_record(run))
        tracker.add(run.run_id)


def shown(ledger: Ledger) -> list[str]:
    """The runs and sweeps in the store, each as often as it is there, with a mark if it is not whole."""
    client = make_client(default_uri(ledger.folder))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    names = [run.data.tags.get(RUN_TAG) or run.data.tags[SWEEP_TAG] for run in runs]
    return sorted(
        name + ("" if run.info.status == "FINISHED" else " cut off") for name, run in zip(names, runs, strict=True)
    )


def everything(sweep: SweepRecord) -> list[str]:
    return sorted([sweep.sweep_id, *(run.run_id for run in RUNS)])


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.02)


def test_runs_are_tracked_meanwhile_and_the_rest_at_the_end(ledger: Ledger, sweep: SweepRecord) -> None:
    with track_sweep(ledger, default_uri(ledger.folder), sweep) as tracker:
        record(ledger, tracker, RUNS[0])
        until(lambda: RUNS[0].run_id in shown(ledger))
        tracker.add("a run without a record")
        record(ledger, tracker, RUNS[1])
        until(lambda: RUNS[1].run_id in shown(ledger))
        write_run(ledger, RUNS[2], done_record(RUNS[2]))  # never added
    assert shown(ledger) == everything(sweep)


def test_a_sweep_that_ran_nothing_is_tracked_all_the_same(ledger: Ledger, sweep: SweepRecord) -> None:
    with track_sweep(ledger, default_uri(ledger.folder), sweep):
        pass
    assert shown(ledger) == [sweep.sweep_id]


@pytest.mark.parametrize("calls", range(0, 16, 3))
def test_a_store_that_goes_down_and_comes_back_meanwhile_has_everything_once(
    ledger: Ledger, sweep: SweepRecord, flaky: Flaky, caplog: pytest.LogCaptureFixture, calls: int
) -> None:
    flaky.calls_left = calls
    with (
        caplog.at_level(logging.INFO, LOGGER),
        track_sweep(ledger, default_uri(ledger.folder), sweep) as tracker,
    ):
        record(ledger, tracker, *RUNS)
        until(lambda: flaky.calls_when_down > 1)
        flaky.calls_left, flaky.is_down = None, False
        until(lambda: shown(ledger) == everything(sweep))
    assert shown(ledger) == everything(sweep)
    assert [r.levelname for r in caplog.records if r.name == LOGGER] == ["INFO"]
    assert "fails (MlflowException: down); it is tried again" in caplog.text


def test_a_store_that_is_back_at_the_end_is_filled_then(
    ledger: Ledger, sweep: SweepRecord, flaky: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_sparse.tracking.background.PAUSE_SECONDS", 1000.0)
    flaky.is_down = True
    with track_sweep(ledger, default_uri(ledger.folder), sweep) as tracker:
        record(ledger, tracker, *RUNS)
        until(lambda: flaky.calls_when_down == 1)
        flaky.is_down = False
    assert shown(ledger) == everything(sweep)


def test_a_store_that_stays_down_is_reported_once_and_may_be_filled_later(
    ledger: Ledger, sweep: SweepRecord, flaky: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    flaky.is_down = True
    with (
        caplog.at_level(logging.WARNING, LOGGER),
        track_sweep(ledger, default_uri(ledger.folder), sweep) as tracker,
    ):
        record(ledger, tracker, *RUNS)
        until(lambda: flaky.calls_when_down > 3)
        ended = time.monotonic()
    assert time.monotonic() - ended < 5
    [warning] = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert warning.startswith(f"MLflow at {default_uri(ledger.folder)} is not up to date (MlflowException: down).")
    assert warning.endswith("`tune-sparse track` fills MLflow later.")
    flaky.is_down = False
    with track_sweep(ledger, default_uri(ledger.folder), sweep):
        pass
    assert shown(ledger) == everything(sweep)


def test_a_fault_of_the_ledger_ends_too(
    ledger: Ledger, sweep: SweepRecord, flaky: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(ledger, RUNS[0], done_record(RUNS[0]))
    (ledger.run_folder(RUNS[0].run_id) / "config.yaml").unlink()
    started = time.monotonic()
    with track_sweep(ledger, default_uri(ledger.folder), sweep):
        pass
    assert time.monotonic() - started < 20
    assert "FileNotFoundError" in caplog.text


@pytest.fixture
def refusing() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """It takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def full() -> Iterator[str]:
    """Its packets go nowhere: nobody takes its connections, and no more of them may wait."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as server,
        socket.socket() as first,
        socket.socket() as next_,
    ):
        for waiting in (first, next_):
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("store", ["refusing", "silent", "full"])
@pytest.mark.parametrize("adds", [True, False])
def test_a_server_that_never_answers_delays_the_end_by_seconds(
    store: str, adds: bool, ledger: Ledger, sweep: SweepRecord, request: pytest.FixtureRequest, caplog: Any
) -> None:
    make_client("http://127.0.0.1:1")  # what MLflow imports is not counted
    with caplog.at_level(logging.WARNING, LOGGER):
        with track_sweep(ledger, request.getfixturevalue(store), sweep) as tracker:
            if adds:
                record(ledger, tracker, *RUNS)
                time.sleep(0.5)
            ended = time.monotonic()
        assert time.monotonic() - ended < SERVER_SECONDS + 2
    [warning] = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert "`tune-sparse track` fills MLflow later" in warning


def test_a_search_of_a_dead_store_is_reported(refusing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    track_search(Ledger(tmp_path), refusing, "one")
    assert time.monotonic() - started < SERVER_SECONDS + 2
    assert "Connection refused" in caplog.text
