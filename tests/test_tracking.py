"""MLflow on SQLite, filled from ledgers written by hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import done_record, failed_record, make_cell, make_run, sweep_of, write_run
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from tune_sparse.config import MODES, SweepConfig
from tune_sparse.result import Ledger, Run
from tune_sparse.tracking import (
    COMPLETE_TAG,
    EXPERIMENT,
    RUN_TAG,
    SWEEP_TAG,
    BackgroundTracker,
    default_uri,
    track_ledger,
    tracking_uri,
)

DONE = make_run(make_cell(seed=0))
FAILED = make_run(make_cell(seed=1))
MISSING = make_run(make_cell(seed=2))
DENSE = make_run(make_cell(sparsity=0.0).trained)
CELLS = [DONE.cell, FAILED.cell, MISSING.cell, *(make_cell(sparsity=0.0, mode=mode) for mode in MODES[:3])]


def by_hand(folder: Path) -> Ledger:
    """A sweep of six cells: one done, one failed, one missing, three that share one done run."""
    ledger = Ledger(folder)
    ledger.write_sweep(sweep_of(CELLS))
    write_run(ledger, DONE, done_record(DONE, accuracy=0.8))
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

    def of(self, run: Run) -> MlflowRun:
        [found] = [found for found in self.runs() if found.data.tags.get(RUN_TAG) == run.run_id]
        return found

    def parents(self) -> list[MlflowRun]:
        return [found for found in self.runs() if SWEEP_TAG in found.data.tags]

    def curve(self, run: Run, name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(self.of(run).info.run_id, name)]


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
    params = store.of(DONE).data.params
    assert (params["method"], params["sparsity"], params["mode"]) == ("unstructured", "0.5", "sparse-to-dense")
    assert (params["learning_rate"], params["n_train"], params["lora_rank"]) == ("0.0003", "None", "16")
    config = DONE.as_config()
    assert params.keys() == config["cell"].keys() | config["protocol"].keys()


def test_a_child_has_its_curves_with_their_steps(store: Store) -> None:
    assert store.curve(DONE, "step_train_loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert store.curve(DONE, "step_eval_loss") == [(3, 0.5)]


def test_a_child_has_its_final_numbers_and_no_invented_ones(store: Store) -> None:
    metrics = store.of(DONE).data.metrics
    assert (metrics["accuracy"], metrics["eval_loss"], metrics["train_seconds"]) == (0.8, 0.5, 2.0)
    assert (metrics["inference_flops_1024"], metrics["inference_flops_8192"]) == (1_000, 8_000)
    assert "compile_seconds" not in metrics
    assert "mask_sha256" not in metrics


def test_a_child_has_its_environment_and_its_status(store: Store) -> None:
    run = store.of(DONE)
    assert run.info.status == "FINISHED"
    assert COMPLETE_TAG in run.data.tags
    assert (run.data.tags["hardware"], run.data.tags["version_torch"]) == ("abacus", "2.13")
    assert run.info.end_time - run.info.start_time == pytest.approx(3_000, abs=2)


def test_a_child_has_its_small_files(store: Store) -> None:
    files = {file.path for file in store.client.list_artifacts(store.of(DONE).info.run_id)}
    assert files == {"config.yaml", "sparse_config.json", "result.json", "validation_report.json", "train.log"}


def test_a_failed_run_says_why(store: Store) -> None:
    run = store.of(FAILED)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "RunError: the loss is nan at step 7"
    assert COMPLETE_TAG in run.data.tags
    assert "accuracy" not in run.data.metrics


def test_tracking_again_changes_nothing(ledger: Ledger, store: Store) -> None:
    before = {run.info.run_id for run in store.runs(ViewType.ALL)}
    assert track_ledger(ledger, store.uri) == 3
    assert {run.info.run_id for run in store.runs(ViewType.ALL)} == before


def test_a_run_cut_off_in_the_middle_of_logging_is_logged_anew_once(ledger: Ledger, store: Store) -> None:
    cut = store.of(DONE).info.run_id
    store.client.delete_tag(cut, COMPLETE_TAG)
    track_ledger(ledger, store.uri)
    again = store.of(DONE)
    assert again.info.run_id != cut
    assert COMPLETE_TAG in again.data.tags
    assert len(store.curve(DONE, "step_train_loss")) == 3
    track_ledger(ledger, store.uri)
    assert store.of(DONE).info.run_id == again.info.run_id


def test_a_parent_cut_off_in_the_middle_of_logging_is_completed(ledger: Ledger, store: Store) -> None:
    later = sweep_of([DONE.cell], started=5_000.0)
    ledger.write_sweep(later)
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    store.client.create_run(experiment.experiment_id, tags={SWEEP_TAG: later.sweep_id})
    track_ledger(ledger, store.uri)
    [parent] = [run for run in store.parents() if run.data.tags[SWEEP_TAG] == later.sweep_id]
    assert parent.data.params["cells"] == "1"
    assert parent.info.status == "FINISHED"


def test_a_run_that_was_discarded_and_repeated_shows_its_new_record(ledger: Ledger, store: Store) -> None:
    before = store.of(DONE).info.run_id
    ledger.set_aside(DONE.run_id, "to be repeated")
    write_run(ledger, DONE, done_record(DONE, accuracy=0.81))
    track_ledger(ledger, store.uri)
    assert store.of(DONE).info.run_id != before
    assert store.of(DONE).data.metrics["accuracy"] == 0.81


def test_a_failed_run_that_is_done_later_is_replaced(ledger: Ledger, store: Store) -> None:
    write_run(ledger, FAILED, done_record(FAILED, accuracy=0.7))
    track_ledger(ledger, store.uri)
    run = store.of(FAILED)
    assert (run.info.status, run.data.metrics["accuracy"]) == ("FINISHED", 0.7)
    assert "error" not in run.data.tags


def test_a_run_of_two_sweeps_is_one_child(ledger: Ledger, store: Store) -> None:
    ledger.write_sweep(sweep_of([DONE.cell, DENSE.cell], started=9_000.0))
    assert track_ledger(ledger, store.uri) == 3
    assert len([run for run in store.runs() if run.data.tags.get(RUN_TAG) == DONE.run_id]) == 1


def test_an_interrupted_run_is_shown_as_killed_with_a_long_error_cut(ledger: Ledger, store: Store) -> None:
    write_run(ledger, MISSING, replace(failed_record(MISSING, "x" * 20_000), status="interrupted"))
    assert track_ledger(ledger, store.uri) == 4
    assert store.of(MISSING).info.status == "KILLED"


def test_runs_are_tracked_in_the_background_and_the_rest_at_the_end(ledger: Ledger, store: Store) -> None:
    sweep = sweep_of([make_cell(seed=10), make_cell(seed=11)], started=20_000.0)
    ledger.write_sweep(sweep)
    announced, silent = (make_run(make_cell(seed=seed)) for seed in (10, 11))
    with BackgroundTracker(ledger, store.uri, sweep.sweep_id) as tracker:
        for run in (announced, silent):
            write_run(ledger, run, done_record(run))
        tracker.add(announced.run_id)
        tracker.add("a run without a record")
    [parent] = [run for run in store.parents() if run.data.tags[SWEEP_TAG] == sweep.sweep_id]
    for run in (announced, silent):
        assert store.of(run).data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_a_sweep_that_ran_nothing_is_tracked_all_the_same(ledger: Ledger, store: Store) -> None:
    sweep = sweep_of([make_cell(seed=10)], started=30_000.0)
    ledger.write_sweep(sweep)
    with BackgroundTracker(ledger, store.uri, sweep.sweep_id):
        pass
    assert sweep.sweep_id in {run.data.tags[SWEEP_TAG] for run in store.parents()}


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///{folder}"])
def test_a_store_that_cannot_be_reached_warns_and_stops_nothing(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    ledger = by_hand(tmp_path)
    uri = uri.format(folder=tmp_path)
    with (
        caplog.at_level(logging.WARNING, "tune_sparse.tracking"),
        BackgroundTracker(ledger, uri, "sweep1000") as tracker,
    ):
        tracker.add(DONE.run_id)
    [warning] = [record for record in caplog.records if record.name == "tune_sparse.tracking"]
    assert f"MLflow at {uri} is not up to date" in warning.getMessage()
    assert "`tune-sparse track` fills MLflow later" in warning.getMessage()
    assert ledger.is_done(DONE.run_id)


def test_the_store_is_sqlite_in_the_results_folder_unless_another_is_named(tmp_path: Path) -> None:
    named: dict[str, Any] = {"models": ("m",), "results_dir": tmp_path}
    assert tracking_uri(SweepConfig(**named)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(SweepConfig(**named, tracking_uri="http://mlflow:5000")) == "http://mlflow:5000"
