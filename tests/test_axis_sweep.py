"""A sweep with an axis through the real Ray Tune and MLflow: chosen, extended, reported."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from analysis.read.load import cells_table
from tune_sparse.cli import main
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.tracking.entries import CHOSEN_TAG, RUN_TAG
from tune_sparse.tracking.sync import EXPERIMENT, default_uri

pytestmark = pytest.mark.xdist_group("machine")

ONE_CELL = "--models tiny-llama --tasks boolq --methods unstructured --sparsities 0.5 --modes sparse-to-sparse"
FEW = "steps=4 eval_every=4 warmup_steps=1 n_train=40 n_selection=8 n_test=20"


def sweep(results: Path, *axes: str) -> int:
    few = ["--set", *FEW.split(), "--results-dir", str(results), "--workers", "1"]
    return main(["sweep", *ONE_CELL.split(), *few, *axes])


def tags(results: Path) -> dict[str, str | None]:
    client = MlflowClient(default_uri(results))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return {r.data.tags[RUN_TAG]: r.data.tags.get(CHOSEN_TAG) for r in runs if RUN_TAG in r.data.tags}


@pytest.mark.slow
def test_an_axis_ends_with_a_pointer_reuses_what_is_done_and_runs_only_what_a_third_value_adds(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path, "--no-report")
    [single] = Ledger(tmp_path).run_ids()
    sweep(tmp_path, "--axis", "learning_rate=3e-3,1e-2", "--no-report")
    two = set(Ledger(tmp_path).run_ids())
    assert single in two, "a run of the axis is the run of the setting"
    assert len(two) == 2
    capsys.readouterr()
    sweep(tmp_path, "--axis", "learning_rate=3e-3,1e-2,1e-3")
    printed = capsys.readouterr().out
    assert "1 trainings in" in printed
    assert "Chosen for each of 1 cells by the loss on selection examples, learning rate: 0.003 in " in printed
    newest = Ledger(tmp_path).sweeps()[-1].sweep_id
    cells = cells_table([tmp_path], [newest])
    assert (len(cells), int(cells["chosen"].sum())) == (3, 1)
    [chosen] = cells.loc[cells["chosen"], "run_id"]
    assert chosen == cells.sort_values("eval_loss", kind="stable")["run_id"].iloc[0]
    assert tags(tmp_path) == {run: str(run == chosen).lower() for run in cells["run_id"]}
    assert len(pd.read_csv(tmp_path / "analysis" / "summary.csv")) == 3
    assert len(pd.read_csv(tmp_path / "analysis" / "choices.csv")) == 1
    findings = (tmp_path / "analysis" / "findings.md").read_text()
    assert "Choosing took 2 runs" in findings
    for more, rows in ((["--all-settings"], 3), ([], 1)):
        main(["results", "--results-dir", str(tmp_path), "--sweep", newest, "--json", *more])
        assert len(json.loads(capsys.readouterr().out)) == rows
