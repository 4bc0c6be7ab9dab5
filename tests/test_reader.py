"""Results folders of two sites, read as one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from factories import done_record, failed_record, make_cell, make_run, make_sweep, write_run
from mlflow import MlflowClient

from analysis.read.load import cells_table
from tune_sparse.cli import main
from tune_sparse.files import read_json, write_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.reader import MergedLedger
from tune_sparse.ledger.record import Record
from tune_sparse.tracking.sync import EXPERIMENT, RUN_TAG, SWEEP_TAG, default_uri

BOTH, HERE, THERE, FAILED, MISSING = (make_run(make_cell(seed=seed)) for seed in range(5))
CELLS = [run.cell for run in (BOTH, HERE, THERE, FAILED, MISSING)]


@pytest.fixture
def sites(tmp_path: Path) -> list[Path]:
    """Two folders of one sweep: one run done at both, one at each, one that failed here and was cut off there."""
    here, there = Ledger(tmp_path / "here"), Ledger(tmp_path / "there")
    here.write_sweep(make_sweep(CELLS))
    there.write_sweep(replace(make_sweep(CELLS), started=900.0))
    for ledger, run, seconds in ((here, BOTH, 3.0), (there, BOTH, 4.0), (here, HERE, 3.0), (there, THERE, 3.0)):
        record = done_record(run)
        write_run(ledger, run, replace(record, measured=record.measured | {"trial_seconds": seconds}))
    write_run(here, FAILED, failed_record(FAILED))
    there.write_record(FAILED, Record(FAILED.run_id, FAILED.identity, "interrupted"))
    there.write_record(HERE, Record(HERE.run_id, HERE.identity, "interrupted"))
    return [here.folder, there.folder]


def in_mlflow(folder: Path) -> dict[str, str]:
    """{run: MLflow's id}, of trainings; there is one parent."""
    client = MlflowClient(default_uri(folder))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    tags = [run.data.tags[RUN_TAG] for run in runs if RUN_TAG in run.data.tags]
    assert len(tags) == len(set(tags)), "nothing is there twice"
    return {run.data.tags[RUN_TAG]: run.info.run_id for run in runs if RUN_TAG in run.data.tags}


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_is_that_of_the_folder_where_it_came_furthest(sites: list[Path], order: int) -> None:
    merged, first = MergedLedger(sites[::order]), sites[::order][0]
    assert merged.run_folder(BOTH.run_id).parents[1] == first
    assert merged.run_folder(HERE.run_id).parents[1] == sites[0]
    assert merged.run_folder(THERE.run_id).parents[1] == sites[1]
    assert merged.record(FAILED.run_id).status == "failed"  # type: ignore[union-attr]
    assert merged.record(MISSING.run_id) is None


def test_a_sweep_of_both_is_one_that_began_when_the_first_did(sites: list[Path]) -> None:
    [sweep] = MergedLedger(sites).sweeps()
    assert sweep.started == 900


def test_every_run_that_any_folder_has_is_named_once(sites: list[Path]) -> None:
    merged = MergedLedger(sites)
    assert merged.run_ids() == sorted(run.run_id for run in (BOTH, HERE, THERE, FAILED))
    assert merged.is_done(THERE.run_id)
    assert not merged.is_done(FAILED.run_id)
    assert merged.run(THERE.run_id) == THERE


def test_a_table_of_both_has_each_cell_once_from_where_its_run_came_furthest(sites: list[Path]) -> None:
    cells = cells_table(sites)
    assert list(cells["status"]) == ["done", "done", "done", "failed", "missing"]
    assert list(cells["cell_id"]) == list(cells_table(sites[::-1])["cell_id"])


def test_searches_of_all_folders_are_found(sites: list[Path]) -> None:
    for folder in sites:
        (folder / "searches" / folder.name).mkdir(parents=True)
    assert [folder.name for folder in MergedLedger(sites).searches()] == ["here", "there"]


def test_track_has_each_run_of_two_folders_once_and_keeps_it(sites: list[Path]) -> None:
    """As it was, the second folder's runs replaced the first's, or removed them, at every call."""
    command = ["track", "--results-dir", *map(str, sites)]
    assert main(command) == 0
    found = in_mlflow(sites[0])
    assert found.keys() == {run.run_id for run in (BOTH, HERE, THERE, FAILED)}
    assert main(command) == 0
    assert in_mlflow(sites[0]) == found


def test_status_counts_each_cell_once(sites: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--results-dir", *map(str, sites), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["cells"], printed["by_status"]) == (5, {"done": 3, "failed": 1, "missing": 1})


def sweep(arguments: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tune_sparse", "sweep", *arguments], capture_output=True, text=True, timeout=480
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
def test_a_gpu_site_and_a_cs3_site_become_one(
    llama: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second site trained on both, so that two cells were trained at each site."""
    few = ["smoke", "--data-dir", "synthetic", "--models", str(llama), "--tasks", "boolq", "--methods", "unstructured"]
    few += ["--set", "steps=12", "n_test=20"]
    gpu_site, cs3_site = tmp_path / "gpu-site", tmp_path / "cs3-site"
    sweep([*few, "--results-dir", str(gpu_site)])
    second = ["--backend", "cerebras", "torch", "--cerebras-target", "cpu", "--sparsities", "0.5"]
    sweep([*few, *second, "--results-dir", str(cs3_site)])
    runs = {folder: {path.name for path in (folder / "runs").glob("[!.]*")} for folder in (gpu_site, cs3_site)}
    assert [len(found) for found in runs.values()] == [3, 4]
    assert len(runs[gpu_site] & runs[cs3_site]) == 2
    for run_id in runs[gpu_site] & runs[cs3_site]:
        records = [Ledger(folder).record(run_id) for folder in (gpu_site, cs3_site)]
        assert records[0].metrics == records[1].metrics  # type: ignore[union-attr]

    both = ["--results-dir", str(gpu_site), str(cs3_site)]
    assert main(["status", *both, "--json"]) == 0
    capsys.readouterr()
    assert main(["audit", *both]) == 0, capsys.readouterr().out
    assert main(["report", *both]) == 0
    cells = cells_table([gpu_site, cs3_site])
    assert cells["run_id"].nunique() == 5
    assert (cells["backend"].value_counts()["cerebras"], set(cells["status"])) == (2, {"done"})
    assert main(["track", *both]) == 0
    tracked = in_mlflow(gpu_site)
    assert tracked.keys() == runs[gpu_site] | runs[cs3_site]
    client = MlflowClient(default_uri(gpu_site))
    parents = [run for run in client.search_runs(["1"]) if SWEEP_TAG in run.data.tags]
    assert len(parents) == 2
    assert main(["track", *both]) == 0
    assert in_mlflow(gpu_site) == tracked

    contested = min(runs[gpu_site] & runs[cs3_site])
    result = Ledger(cs3_site).run_folder(contested) / "result.json"
    record = read_json(result)
    write_json(result, record | {"metrics": record["metrics"] | {"train_loss": 0.125}})
    capsys.readouterr()
    assert main(["audit", *both, "--all"]) == 1
    assert (
        f"{contested} differs between {gpu_site} (which counts) and {cs3_site}: train_loss" in capsys.readouterr().out
    )
    assert main(["report", *both]) == 1
