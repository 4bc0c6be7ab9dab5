"""The ledger: whole folders or none, whatever breaks or races."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from factories import done_record, failed_record, make_cell, make_run, make_sweep, write_run

from tune_sparse.config import Protocol
from tune_sparse.evaluation.outcomes import Outcome, read_outcomes
from tune_sparse.files import aside, read_json, write_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run, write_config


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


def test_nothing_appears_before_a_run_is_whole(ledger: Ledger) -> None:
    run = make_run()
    with ledger.writing(run.run_id) as folder:
        write_json(folder / "result.json", asdict(done_record(run)))
        assert not ledger.run_folder(run.run_id).exists()
        assert ledger.record(run.run_id) is None
    assert ledger.is_done(run.run_id)
    assert [path.name for path in (ledger.folder / "runs").iterdir()] == [run.run_id]


def half_written(ledger: Ledger, run: Run) -> None:
    with ledger.writing(run.run_id) as folder:
        (folder / "train.log").write_text("began")
        raise KeyboardInterrupt


def test_an_exception_leaves_nothing(ledger: Ledger) -> None:
    with pytest.raises(KeyboardInterrupt):
        half_written(ledger, make_run())
    assert list((ledger.folder / "runs").iterdir()) == []


def test_an_exception_leaves_the_earlier_record(ledger: Ledger) -> None:
    run = make_run()
    write_run(ledger, run, failed_record(run))
    with pytest.raises(KeyboardInterrupt):
        half_written(ledger, run)
    assert ledger.record(run.run_id) == failed_record(run)
    assert not (ledger.folder / "set_aside").exists()


def written_without_folder(ledger: Ledger) -> None:
    with ledger.writing("run") as folder:
        ledger.remove_partial()
        write_json(folder / "result.json", {})


def test_a_writer_whose_folder_was_removed_leaves_no_half_run(ledger: Ledger) -> None:
    with pytest.raises(FileNotFoundError):
        written_without_folder(ledger)
    assert list((ledger.folder / "runs").iterdir()) == []


def test_a_run_is_on_the_disk_before_it_has_its_name(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve()))
    folder = write_run(ledger, make_run(), done_record(make_run()))
    *within, partial, runs = flushed
    assert {path.relative_to(partial) for path in within} == {path.relative_to(folder) for path in folder.rglob("*")}
    assert partial != folder
    assert runs == folder.parent


def test_a_folder_without_a_record_is_dropped(ledger: Ledger) -> None:
    with ledger.writing("run") as folder:
        (folder / "train.log").write_text("began")
    assert list((ledger.folder / "runs").iterdir()) == []


def test_a_failed_run_is_set_aside_by_a_new_one(ledger: Ledger) -> None:
    run = make_run()
    write_run(ledger, run, failed_record(run))
    write_run(ledger, run, done_record(run))
    assert ledger.is_done(run.run_id)
    [aside_folder] = (ledger.folder / "set_aside").iterdir()
    assert read_json(aside_folder / "set_aside.json")["reason"] == "tried again"
    assert Record(**read_json(aside_folder / "result.json")) == failed_record(run)


def test_a_done_run_is_never_replaced(ledger: Ledger) -> None:
    run = make_run()
    write_run(ledger, run, done_record(run, accuracy=0.9))
    write_run(ledger, run, done_record(run, accuracy=0.1))
    ledger.write_record(run, failed_record(run))
    assert ledger.record(run.run_id) == done_record(run, accuracy=0.9)
    assert not (ledger.folder / "set_aside").exists()
    assert len(list((ledger.folder / "runs").iterdir())) == 1


def test_of_two_workers_that_finish_one_run_at_once_one_is_kept_and_not_moved_again(ledger: Ledger) -> None:
    """The driver recorded a worker as lost; that one and those that replaced it end at the same time."""
    for number in range(40):
        run = make_run(make_cell(seed=number))
        write_run(ledger, run, failed_record(run))
        together = Barrier(2)

        def finish(accuracy: float, run: Run = run, together: Barrier = together) -> None:
            with ledger.writing(run.run_id) as folder:
                write_config(folder, run)
                write_json(folder / "result.json", asdict(done_record(run, accuracy)))
                together.wait()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(finish, (0.1, 0.2)))
        assert ledger.is_done(run.run_id)
        assert not (ledger.run_folder(run.run_id) / "set_aside.json").exists()
    assert len(list((ledger.folder / "runs").iterdir())) == 40
    kept = [read_json(path)["status"] for path in (ledger.folder / "set_aside").glob("*/result.json")]
    assert kept == ["failed"] * 40


def test_a_run_that_was_finished_since_one_looked_goes_back(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    write_run(ledger, run, failed_record(run))
    slow = Ledger(ledger.folder)
    set_aside = slow.set_aside

    def too_late(run_id: str, reason: str) -> Path:
        write_run(ledger, run, done_record(run, accuracy=0.9))
        return set_aside(run_id, reason)

    monkeypatch.setattr(slow, "set_aside", too_late)
    write_run(slow, run, done_record(run, accuracy=0.1))
    assert ledger.record(run.run_id) == done_record(run, accuracy=0.9)
    assert not (ledger.run_folder(run.run_id) / "set_aside.json").exists()
    assert len(list((ledger.folder / "set_aside").iterdir())) == 1


def test_the_first_accuracy_before_tuning_stays(ledger: Ledger) -> None:
    first, second = ([Outcome("boolq", "a", acc=correct)] for correct in (True, False))
    ledger.write_pruned_baseline("u", {"accuracy": 1.0}, first)
    ledger.write_pruned_baseline("u", {"accuracy": 0.0}, second)
    assert ledger.pruned_baseline("u") == {"accuracy": 1.0}
    assert read_outcomes(ledger.folder / "pruned_baselines" / "u.parquet") == first


def test_a_checkpoint_that_was_saved_after_its_run_was_done_goes_with_what_is_left(ledger: Ledger) -> None:
    done, going = make_run(), make_run(make_cell(seed=1))
    write_run(ledger, done, done_record(done))
    ledger.checkpoint(done.run_id).parent.mkdir()
    for run in (done, going):
        ledger.checkpoint(run.run_id).touch()
    ledger.remove_partial()
    assert not ledger.checkpoint(done.run_id).exists()
    assert ledger.checkpoint(going.run_id).exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"run_id": "x", "ident',
        b"null",
        b"[]",
        b'"done"',
        b'{"status": "done"}',
        b"\xff\xfe",
        b'{"run_id": "x", "identity": "x", "status": "done", "surprise": 1}',
    ],
)
def test_a_record_that_cannot_be_read_is_not_done(ledger: Ledger, content: bytes) -> None:
    run = make_run()
    path = write_run(ledger, run, done_record(run)) / "result.json"
    path.write_bytes(content)
    assert ledger.record(run.run_id) is None
    assert not ledger.is_done(run.run_id)


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_that_did_not_finish_is_not_done(ledger: Ledger, status: Any) -> None:
    run = make_run()
    ledger.write_record(run, replace(failed_record(run), status=status))
    assert ledger.record(run.run_id) is not None
    assert not ledger.is_done(run.run_id)


def test_a_record_is_read_as_it_was_written(ledger: Ledger) -> None:
    run = make_run()
    write_run(ledger, run, done_record(run))
    assert ledger.record(run.run_id) == done_record(run)


@pytest.mark.parametrize(
    "run",
    [
        make_run(),
        make_run(data_dir="/data", protocol=Protocol(learning_rate=1e-5, final_learning_rate=1e-6, n_selection=None)),
        make_run(make_cell(sparsity=0.1, model="123", seed=7)),
    ],
)
def test_a_run_is_read_back_from_its_config(ledger: Ledger, run: Run) -> None:
    ledger.write_record(run, done_record(run))
    assert ledger.run(run.run_id) == run
    assert ledger.run(run.run_id).identity == run.identity
    assert Run.from_config(json.loads(json.dumps(run.as_config()))) == run


def test_a_run_set_aside_is_kept_whole_with_the_reason(ledger: Ledger) -> None:
    run = make_run()
    names = {path.name for path in write_run(ledger, run, done_record(run)).iterdir()}
    target = ledger.set_aside(run.run_id, "wrong data")
    assert not ledger.is_done(run.run_id)
    assert not ledger.run_folder(run.run_id).exists()
    assert target.parent == ledger.folder / "set_aside"
    assert {path.name for path in target.iterdir()} == names | {"set_aside.json"}
    assert read_json(target / "set_aside.json")["reason"] == "wrong data"


def test_the_same_run_can_be_set_aside_twice(ledger: Ledger) -> None:
    run = make_run()
    for reason in ("one", "two"):
        write_run(ledger, run, done_record(run))
        ledger.set_aside(run.run_id, reason)
    reasons = [read_json(path / "set_aside.json")["reason"] for path in (ledger.folder / "set_aside").iterdir()]
    assert sorted(reasons) == ["one", "two"]


def test_what_killed_writers_left_is_removed_and_nothing_else(ledger: Ledger) -> None:
    run = make_run()
    folder = write_run(ledger, run, done_record(run))
    ledger.write_pruned_baseline("u", {"accuracy": 0.5}, [Outcome("boolq", "a", acc=True)])
    half_run, half_file = aside(folder), aside(ledger.folder / "pruned_baselines" / "v.json")
    half_lease = aside(ledger.folder / "lease.json")
    half_run.mkdir()
    (half_run / "result.json").write_text("{")
    half_file.write_text("{")
    half_lease.write_text("{")
    ledger.remove_partial()
    assert not half_run.exists()
    assert not half_file.exists()
    assert not half_lease.exists()
    assert ledger.is_done(run.run_id)
    assert ledger.pruned_baseline("u") == {"accuracy": 0.5}


def test_an_accuracy_before_tuning_is_kept_and_unknown_before(ledger: Ledger) -> None:
    assert ledger.pruned_baseline("u") is None
    outcomes = [Outcome("boolq", "a", acc=True), Outcome("boolq", "b", acc=False)]
    ledger.write_pruned_baseline("u", {"accuracy": 0.5}, outcomes)
    assert ledger.pruned_baseline("u") == {"accuracy": 0.5}
    assert read_outcomes(ledger.folder / "pruned_baselines" / "u.parquet") == outcomes


def test_sweeps_are_read_back_the_oldest_first(ledger: Ledger) -> None:
    sweeps = [
        make_sweep([make_cell(seed=seed)], started=started) for seed, started in ((0, 30.0), (1, 10.0), (2, 20.0))
    ]
    for sweep in sweeps:
        ledger.write_sweep(sweep)
    assert [sweep.started for sweep in ledger.sweeps()] == [10.0, 20.0, 30.0]
    assert [dict(cell) for cell in ledger.sweeps()[2].cells] == list(sweeps[0].cells)


def test_an_empty_folder_has_no_sweeps_and_no_records(ledger: Ledger) -> None:
    assert ledger.sweeps() == []
    assert ledger.record("any") is None
    ledger.remove_partial()


def test_what_a_broken_disk_left_of_an_accuracy_before_tuning_is_measured_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write_pruned_baseline("one", {"metrics": {"accuracy": 0.5}}, [])
    (tmp_path / "pruned_baselines" / "one.json").write_bytes(b"")
    assert ledger.pruned_baseline("one") is None
    ledger.write_pruned_baseline("one", {"metrics": {"accuracy": 0.25}}, [])
    assert ledger.pruned_baseline("one") == {"metrics": {"accuracy": 0.25}}
