"""MLflow on SQLite, filled from ledgers written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copy
from threading import Thread
from typing import Any

import pytest
from factories import done_record, failed_record, make_cell, make_run, make_sweep, write_run
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from tune_sparse.config import SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.files import write_json
from tune_sparse.ledger.dynamics import append_dynamics
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.modes import MODES
from tune_sparse.tracking.entries import (
    CANDIDATE_TAG,
    RECORD_TAG,
    RUN_TAG,
    SEARCH_TAG,
    SWEEP_TAG,
    record_hash,
)
from tune_sparse.tracking.sync import (
    EXPERIMENT,
    Tracker,
    default_uri,
    every_run,
    make_client,
    track_ledger,
    tracking_uri,
)

pytestmark = pytest.mark.xdist_group("machine")

DONE = make_run(make_cell(seed=0))
FAILED = make_run(make_cell(seed=1))
MISSING = make_run(make_cell(seed=2))
DENSE = make_run(make_cell(sparsity=0.0).trained)
TRACKED = {DONE.run_id, FAILED.run_id, DENSE.run_id}
CELLS = [DONE.cell, FAILED.cell, MISSING.cell, *(make_cell(sparsity=0.0, mode=mode) for mode in list(MODES)[:3])]


def by_hand(folder: Path) -> Ledger:
    """A sweep of six cells: one done, one failed, one missing, three that share one done run."""
    ledger = Ledger(folder)
    ledger.write_sweep(make_sweep(CELLS))
    folder = write_run(ledger, DONE, done_record(DONE, accuracy=0.8))
    for step, rate in ((0, 0.0), (5, 0.25)):
        dead = {f"dead_neurons/{name}.out": 0.5 for name in ("average", "model.layers.0.self_attn.q_proj.weight")}
        append_dynamics(folder, {"step": step, "weight_revival/rate": rate, "health": "notice"} | dead)
    write_run(ledger, FAILED, failed_record(FAILED))
    write_run(ledger, DENSE, done_record(DENSE, accuracy=0.9))
    return ledger


class Store:
    """One MLflow store with what a test asks of it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri)

    def runs(self, view: int = ViewType.ACTIVE_ONLY) -> list[MlflowRun]:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        return list(self.client.search_runs([experiment.experiment_id], run_view_type=view))

    def find(self, run: Run) -> MlflowRun:
        [found] = [found for found in self.runs() if found.data.tags.get(RUN_TAG) == run.run_id]
        return found

    def parents(self) -> list[MlflowRun]:
        return [found for found in self.runs() if SWEEP_TAG in found.data.tags]

    def curve(self, run: Run, name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(self.find(run).info.run_id, name)]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return by_hand(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def store(ledger: Ledger) -> Store:
    """Filled from `ledger`, whose tests come first in this file and leave it as it is."""
    assert track_ledger(ledger, default_uri(ledger.folder)) == 3
    return Store(default_uri(ledger.folder))


def test_a_sweep_is_one_parent_with_a_child_for_each_recorded_run(store: Store) -> None:
    [parent] = store.parents()
    children = [run for run in store.runs() if RUN_TAG in run.data.tags]
    assert {run.data.tags[RUN_TAG] for run in children} == {DONE.run_id, FAILED.run_id, DENSE.run_id}
    assert len(children) == 3
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    assert parent.info.start_time == 1_000_000
    assert parent.data.params == {"models": '["tiny"]', "cells": "6"}


def test_a_child_has_every_setting(store: Store) -> None:
    params = store.find(DONE).data.params
    assert (params["method"], params["sparsity"], params["mode"]) == ("unstructured", "0.5", "sparse-to-dense")
    assert (params["learning_rate"], params["n_train"], params["lora_rank"]) == ("0.0003", "None", "16")
    config = DONE.as_config()
    assert params.keys() == config["cell"].keys() | config["protocol"].keys()


def test_a_child_has_its_curves_with_their_steps(store: Store) -> None:
    assert store.curve(DONE, "step_train_loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert store.curve(DONE, "step_eval_loss") == [(3, 0.5)]


def test_a_child_has_its_masks_over_steps_but_not_those_of_each_matrix(store: Store) -> None:
    assert store.curve(DONE, "weight_revival/rate") == [(0, 0.0), (5, 0.25)]
    dead = {name for name in store.find(DONE).data.metrics if name.startswith("dead_neurons")}
    assert dead == {"dead_neurons/average.out"}


def test_a_child_has_its_final_numbers_and_no_invented_ones(store: Store) -> None:
    metrics = store.find(DONE).data.metrics
    assert (metrics["accuracy"], metrics["eval_loss"], metrics["train_seconds"]) == (0.8, 0.5, 2.0)
    assert (metrics["acc"], metrics["acc_stderr"], metrics["acc_before_tuning"]) == (0.8, 0.03, 0.5)
    assert store.find(DONE).data.tags["primary_metric"] == "acc"
    assert (metrics["inference_flops_1024"], metrics["inference_flops_8192"]) == (1_000, 8_000)
    assert "compile_seconds" not in metrics
    assert "mask_sha256" not in metrics


def test_a_child_has_its_environment_and_its_status(store: Store) -> None:
    run = store.find(DONE)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["hardware"], run.data.tags["version_torch"]) == ("abacus", "2.13")
    assert run.info.end_time - run.info.start_time == pytest.approx(3_000, abs=2)


def test_a_child_has_its_small_files(store: Store) -> None:
    files = {file.path for file in store.client.list_artifacts(store.find(DONE).info.run_id)}
    small = {"config.yaml", "sparse_config.json", "result.json", "validation_report.json", "train.log"}
    assert files == small | {"dynamics.jsonl"}


def test_a_failed_run_says_why(store: Store) -> None:
    run = store.find(FAILED)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "RunError: the loss is nan at step 7"
    assert "accuracy" not in run.data.metrics


def test_tracking_again_changes_nothing(ledger: Ledger, store: Store) -> None:
    before = {run.info.run_id for run in store.runs(ViewType.ALL)}
    assert track_ledger(ledger, store.uri) == 3
    assert {run.info.run_id for run in store.runs(ViewType.ALL)} == before


def test_a_run_cut_off_in_the_middle_of_logging_is_logged_anew_once(ledger: Ledger, store: Store) -> None:
    cut = store.find(DONE).info.run_id
    store.client.update_run(cut, "RUNNING")
    track_ledger(ledger, store.uri)
    again = store.find(DONE)
    assert again.info.run_id != cut
    assert again.info.status == "FINISHED"
    assert len(store.curve(DONE, "step_train_loss")) == 3
    track_ledger(ledger, store.uri)
    assert store.find(DONE).info.run_id == again.info.run_id


def test_a_parent_cut_off_in_the_middle_of_logging_is_completed(ledger: Ledger, store: Store) -> None:
    later = make_sweep([DONE.cell], started=5_000.0)
    ledger.write_sweep(later)
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    store.client.create_run(experiment.experiment_id, tags={SWEEP_TAG: later.sweep_id})
    track_ledger(ledger, store.uri)
    [parent] = [run for run in store.parents() if run.data.tags[SWEEP_TAG] == later.sweep_id]
    assert parent.data.params["cells"] == "1"
    assert parent.info.status == "FINISHED"


def test_a_run_that_was_discarded_and_repeated_shows_its_new_record(ledger: Ledger, store: Store) -> None:
    before = store.find(DONE).info.run_id
    ledger.set_aside(DONE.run_id, "to be repeated")
    write_run(ledger, DONE, done_record(DONE, accuracy=0.81))
    track_ledger(ledger, store.uri)
    assert store.find(DONE).info.run_id != before
    assert store.find(DONE).data.metrics["accuracy"] == 0.81


def test_a_failed_run_that_is_done_later_is_replaced(ledger: Ledger, store: Store) -> None:
    write_run(ledger, FAILED, done_record(FAILED, accuracy=0.7))
    track_ledger(ledger, store.uri)
    run = store.find(FAILED)
    assert (run.info.status, run.data.metrics["accuracy"]) == ("FINISHED", 0.7)
    assert "error" not in run.data.tags


def test_a_run_of_two_sweeps_is_one_child(ledger: Ledger, store: Store) -> None:
    ledger.write_sweep(make_sweep([DONE.cell, DENSE.cell], started=9_000.0))
    assert track_ledger(ledger, store.uri) == 3
    assert len([run for run in store.runs() if run.data.tags.get(RUN_TAG) == DONE.run_id]) == 1


def test_an_interrupted_run_is_shown_as_killed_with_a_long_error_cut(ledger: Ledger, store: Store) -> None:
    write_run(ledger, MISSING, replace(failed_record(MISSING, "x" * 20_000), status="interrupted"))
    assert track_ledger(ledger, store.uri) == 4
    assert store.find(MISSING).info.status == "KILLED"


def test_the_store_is_sqlite_in_the_results_folder_unless_another_is_named(tmp_path: Path) -> None:
    named: dict[str, Any] = {"models": ("m",), "results_dir": tmp_path}
    assert tracking_uri(SweepConfig(**named)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(SweepConfig(**named, tracking_uri="http://mlflow:5000")) == "http://mlflow:5000"


def test_mlflow_tracking_uri_names_the_store_where_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: dict[str, Any] = {"models": ("m",), "results_dir": tmp_path}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(SweepConfig(**named)) == "http://mlflow:5000"
    assert tracking_uri(SweepConfig(**named, tracking_uri="http://other:5000")) == "http://other:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI must hold no password"):
        tracking_uri(SweepConfig(**named))


class Meddling:
    """A client beside which somebody else acts once, before the call that is named."""

    def __init__(self, uri: str, before: str, act: Callable[..., object]) -> None:
        self._client, self._before, self._act = make_client(uri), before, act

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._client, name)

        def meddled(*arguments: Any, **named: Any) -> Any:
            if name == self._before:
                self._before = ""
                self._act(*arguments)
            return call(*arguments, **named)

        return meddled


@pytest.fixture
def fresh(tmp_path: Path, empty_store: Path) -> tuple[Ledger, Store]:
    """Six cells that nobody has tracked, and an empty store."""
    copy(empty_store, tmp_path)
    return by_hand(tmp_path), Store(default_uri(tmp_path))


def assert_each_once(ledger: Ledger, store: Store) -> None:
    """Each record is a whole run below the one parent, and nothing else is there."""
    [parent], runs = store.parents(), store.runs()
    assert sorted(run.data.tags.get(RUN_TAG, "") for run in runs) == sorted(["", *TRACKED])
    for run in (DONE, FAILED, DENSE):
        shown, record = store.find(run), ledger.record(run.run_id)
        assert record is not None
        assert shown.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert shown.data.tags[RECORD_TAG] == record_hash(record)
        assert shown.data.metrics.get("accuracy") == record.metrics.get("accuracy")
        assert {file.path for file in store.client.list_artifacts(shown.info.run_id)} >= {"result.json", "train.log"}
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED"}


def move_to_another_site(folder: Path) -> Ledger:
    """Two runs that nobody else has."""
    other, runs = Ledger(folder), [make_run(make_cell(seed=seed)) for seed in (77, 78)]
    other.write_sweep(make_sweep([run.cell for run in runs], started=7_000.0))
    for run in runs:
        write_run(other, run, done_record(run))
    return other


def split_by_folder(store: Store) -> tuple[list[str], list[str]]:
    """The sweeps and runs of the store, each as often as it is there: those of `by_hand`, and the others."""
    runs = store.runs()
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED"}
    names = sorted(run.data.tags.get(RUN_TAG) or run.data.tags[SWEEP_TAG] for run in runs)
    mine = {*TRACKED, "sweep1000"}
    return [name for name in names if name in mine], [name for name in names if name not in mine]


def everything(ledger: Ledger) -> list[str]:
    recorded = [run_id for run_id in ledger.run_ids() if ledger.record(run_id)]
    return sorted([*recorded, *(sweep.sweep_id for sweep in ledger.sweeps())])


def test_two_folders_at_once_leave_each_run_once(fresh: tuple[Ledger, Store], tmp_path: Path) -> None:
    ledger, store = fresh
    ledgers = [ledger, move_to_another_site(tmp_path / "other")]
    writers = [Thread(target=track_ledger, args=(one, store.uri)) for one in ledgers]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert split_by_folder(store) == tuple(everything(one) for one in ledgers)


@pytest.mark.parametrize("before", ["create_experiment", "create_run", "log_batch", "set_terminated", "delete_run"])
def test_another_folder_in_the_middle_leaves_each_run_once(
    fresh: tuple[Ledger, Store], tmp_path: Path, before: str
) -> None:
    ledger, store = fresh
    other = move_to_another_site(tmp_path / "other")
    if before == "delete_run":
        track_ledger(ledger, store.uri)
        store.client.update_run(store.find(DONE).info.run_id, "RUNNING")
    client = Meddling(store.uri, before, lambda *_: track_ledger(other, store.uri))
    assert Tracker(ledger, store.uri, client).fill(Tracker.fill_ledger) == 3
    assert split_by_folder(store) == (everything(ledger), everything(other))


def test_a_second_writer_of_the_same_folder_is_put_right_by_the_next_fill(fresh: tuple[Ledger, Store]) -> None:
    """`track` while a sweep goes on: what both logged goes, and the children of the second parent move."""
    ledger, store = fresh
    client = Meddling(store.uri, "create_run", lambda *_: track_ledger(ledger, store.uri))
    Tracker(ledger, store.uri, client).fill_ledger()
    assert len(store.parents()) == 2
    track_ledger(ledger, store.uri)
    assert_each_once(ledger, store)


def test_a_request_that_was_served_twice_leaves_one_run(fresh: tuple[Ledger, Store]) -> None:
    """MLflow's client repeats a request whose answer was lost."""
    ledger, store = fresh
    client = Meddling(store.uri, "create_run", make_client(store.uri).create_run)
    Tracker(ledger, store.uri, client).fill(Tracker.fill_ledger)
    assert_each_once(ledger, store)


def test_children_of_a_parent_that_was_removed_hang_below_the_one_that_stays(fresh: tuple[Ledger, Store]) -> None:
    ledger, store = fresh
    track_ledger(ledger, store.uri)
    [parent] = store.parents()
    store.client.delete_run(parent.info.run_id)
    track_ledger(ledger, store.uri)
    assert_each_once(ledger, store)


def test_what_belongs_to_other_ledgers_is_left_alone(fresh: tuple[Ledger, Store], tmp_path: Path) -> None:
    ledger, store = fresh
    other, run = Ledger(tmp_path / "other"), make_run(make_cell(seed=77))
    other.write_sweep(make_sweep([run.cell], started=7_000.0))
    write_run(other, run, done_record(run))
    track_ledger(other, store.uri)
    theirs = {found.info.run_id for found in store.runs()}
    store.client.update_run(store.find(run).info.run_id, "RUNNING")
    track_ledger(ledger, store.uri)
    assert len(theirs) == 2
    assert theirs < {found.info.run_id for found in store.runs()}


def test_a_run_whose_record_is_gone_goes_whatever_logged_it(fresh: tuple[Ledger, Store]) -> None:
    ledger, store = fresh
    track_ledger(ledger, store.uri)
    store.client.delete_tag(store.find(DONE).info.run_id, RECORD_TAG)
    ledger.set_aside(DONE.run_id, "to be repeated")
    track_ledger(ledger, store.uri)
    assert DONE.run_id not in {run.data.tags.get(RUN_TAG) for run in store.runs()}


def test_orphans_of_other_ledgers_are_left_alone(fresh: tuple[Ledger, Store]) -> None:
    ledger, store = fresh
    track_ledger(ledger, store.uri)
    experiment = store.client.get_experiment_by_name(EXPERIMENT).experiment_id
    tags = {RUN_TAG: "theirs", "mlflow.parentRunId": "0" * 32}
    theirs = store.client.create_run(experiment, tags=tags).info.run_id
    before = {run.info.run_id for run in store.runs()}
    Tracker(ledger, store.uri).fill(Tracker.fill_ledger)
    assert {run.info.run_id for run in store.runs()} == before, "nothing was amiss"
    assert store.client.get_run(theirs).info.lifecycle_stage == "active"


def test_candidates_go_with_their_search(fresh: tuple[Ledger, Store]) -> None:
    ledger, store = fresh
    folder = ledger.folder / "searches" / "one"
    (folder / "trials").mkdir(parents=True)
    write_json(folder / "config.json", {"started": 1_000.0, "task": "boolq"})
    trial = {"state": "complete", "ranks": {"0.q": 16}, "accuracy": 0.5, "cost": {"parameters": 10}, "examples": 4}
    for number in range(3):
        write_json(folder / "trials" / f"{number}.json", {"number": number} | trial)
    for best in (0.5, 0.6):
        write_json(folder / "result.json", {"best": best})
        track_ledger(ledger, store.uri)
        [parent] = [run for run in store.runs() if SEARCH_TAG in run.data.tags]
        candidates = [run for run in store.runs() if CANDIDATE_TAG in run.data.tags]
        assert parent.data.metrics["best"] == best
        assert {run.data.tags["mlflow.parentRunId"] for run in candidates} == {parent.info.run_id}
        assert len(candidates) == 3


def test_candidates_of_a_search_that_a_person_removed_go(fresh: tuple[Ledger, Store]) -> None:
    ledger, store = fresh
    track_ledger(ledger, store.uri)
    experiment = store.client.get_experiment_by_name(EXPERIMENT).experiment_id
    tags = {CANDIDATE_TAG: "0", "mlflow.parentRunId": "0" * 32}
    store.client.create_run(experiment, tags=tags)
    track_ledger(ledger, store.uri)
    assert_each_once(ledger, store)


def test_runs_are_read_page_by_page_each_once(fresh: tuple[Ledger, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_sparse.tracking.sync.PAGE_RUNS", 2)
    ledger, store = fresh
    track_ledger(ledger, store.uri)
    assert_each_once(ledger, store)
    experiment = store.client.get_experiment_by_name(EXPERIMENT).experiment_id
    read = every_run(store.client, experiment)
    next(read)
    store.client.create_run(experiment)  # it is newest, and shifts the pages
    assert len({run.info.run_id for run in read}) == 3
