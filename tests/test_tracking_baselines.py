"""Published numbers in MLflow on SQLite: imported twice without a duplicate, and never taken for a run of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from factories import done_record, make_cell, make_run, make_sweep, write_run
from mlflow import MlflowClient
from mlflow.entities import ViewType
from test_published import published, write_published

from analysis.baselines.published import as_runs
from tune_sparse.cli import main
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.tracking.baselines import (
    COMPLETE_TAG,
    PUBLISHED_EXPERIMENT,
    PUBLISHED_TAG,
    comparison_page,
    track_published,
)
from tune_sparse.tracking.entries import RUN_TAG
from tune_sparse.tracking.sync import EXPERIMENT, default_uri, every_run, track_ledger

pytestmark = pytest.mark.xdist_group("machine")

ROWS = [
    published(model="tiny", task="boolq"),
    published(model="llama-7b", tuning="SQFT + SparsePEFT", kind="restated"),
    published(model="Llama-2-7b-hf", task="boolq", tuning="Shears", value=0.4),
]


def runs_in(uri: str, experiment: str, view: int = ViewType.ACTIVE_ONLY) -> list[Any]:
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], run_view_type=view))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tasks of ours, each at sparsity 0 and 0.5, beside `ROWS`."""
    ledger = Ledger(tmp_path_factory.mktemp("results"))
    cells = [make_cell(task=task, sparsity=sparsity) for task in ("boolq", "gsm8k") for sparsity in (0.0, 0.5)]
    ledger.write_sweep(make_sweep(cells))
    for cell in cells:
        run = make_run(cell.trained)
        write_run(ledger, run, done_record(run, 0.9 - cell.sparsity / 2, exact_match_strict=0.5))
    track_ledger(ledger, default_uri(ledger.folder))
    assert track_published(as_runs(ROWS), default_uri(ledger.folder)) == 3
    return default_uri(ledger.folder)


def test_none_can_be_mistaken_for_a_run_of_ours(uri: str) -> None:
    ours, theirs = runs_in(uri, EXPERIMENT), runs_in(uri, PUBLISHED_EXPERIMENT)
    assert len(theirs) == 3
    for run in theirs:
        assert run.info.run_name.startswith(f"PUBLISHED ({run.data.tags['published.kind']})")
        assert run.data.params["backend"] == "published"
        assert run.data.tags["published.address"].startswith("https://")
        assert RUN_TAG not in run.data.tags
    assert all(PUBLISHED_TAG not in run.data.tags and run.data.params.get("backend") != "published" for run in ours)


def test_names_are_those_of_our_runs(uri: str) -> None:
    ours = next(run for run in runs_in(uri, EXPERIMENT) if RUN_TAG in run.data.tags)
    for run in runs_in(uri, PUBLISHED_EXPERIMENT):
        assert run.data.metrics.keys() <= ours.data.metrics.keys()
        assert run.data.params.keys() - {"tuning", "training"} <= ours.data.params.keys()
        assert (run.data.params["sparsity"], run.data.params["num_fewshot"]) == ("0.5", "5")


def test_importing_twice_makes_no_duplicate(uri: str) -> None:
    before = {run.info.run_id for run in runs_in(uri, PUBLISHED_EXPERIMENT, ViewType.ALL)}
    assert track_published(as_runs(ROWS), uri) == 3
    assert {run.info.run_id for run in runs_in(uri, PUBLISHED_EXPERIMENT, ViewType.ALL)} == before


def test_the_page_has_our_best_sparse_runs_and_theirs(uri: str) -> None:
    page = comparison_page(uri)
    assert page is not None
    assert (page.ours, page.published) == (2, 3)
    query = parse_qs(page.address.partition("?")[2])
    ids = json.loads(unquote(query["runs"][0]))
    client = MlflowClient(tracking_uri=uri)
    shown = [client.get_run(id_) for id_ in ids]
    assert [run.data.params["task"] for run in shown[:2]] == ["boolq", "gsm8k"]
    assert {run.data.params["sparsity"] for run in shown[:2]} == {"0.5"}
    assert [run.data.params["model"] for run in shown[2:]] == ["tiny", "llama-7b", "Llama-2-7b-hf"]
    assert len(json.loads(unquote(query["experiments"][0]))) == 2


def test_a_run_that_was_cut_off_is_logged_anew(uri: str) -> None:
    client = MlflowClient(tracking_uri=uri)
    cut = runs_in(uri, PUBLISHED_EXPERIMENT)[0].info.run_id
    client.delete_tag(cut, COMPLETE_TAG)
    track_published(as_runs(ROWS), uri)
    active = runs_in(uri, PUBLISHED_EXPERIMENT)
    assert len(active) == 3
    assert cut not in {run.info.run_id for run in active}


def test_a_number_that_was_fixed_takes_the_place_of_the_old_one(uri: str) -> None:
    fixed = [replace(ROWS[0], value=0.51), *ROWS[1:]]
    assert track_published(as_runs(fixed), uri) == 3
    values = [run.data.metrics["exact_match_strict"] for run in runs_in(uri, PUBLISHED_EXPERIMENT)]
    assert sorted(values) == [0.4, 0.501, 0.51]


def test_without_runs_of_ours_there_is_no_page(tmp_path: Path) -> None:
    empty = default_uri(tmp_path)
    assert comparison_page(empty) is None
    track_published(as_runs(ROWS[:1]), empty)
    assert comparison_page(empty) is None
    track_ledger(Ledger(tmp_path), empty)
    assert comparison_page(empty) is None


def test_the_command_checks_the_files_before_it_tracks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Ledger(tmp_path).write_sweep(make_sweep([make_cell()]))
    wrong = write_published(tmp_path / "own.csv", {"value": "50"})
    assert main(["track", "--results-dir", str(tmp_path), "--baselines", str(wrong)]) == 2
    assert "own.csv, line 2: exact_match_strict must be in [0, 1], got 50. Did you mean 0.5?" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_the_command_imports_the_built_in_numbers_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ledger(tmp_path).write_sweep(make_sweep([make_cell()]))
    own = write_published(tmp_path / "own.csv", {"model": "tiny"})
    assert main(["track", "--results-dir", str(tmp_path), "--baselines", str(own)]) == 0
    assert "429 published runs are in sqlite" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=default_uri(tmp_path))
    experiment = client.get_experiment_by_name(PUBLISHED_EXPERIMENT).experiment_id
    assert len(list(every_run(client, experiment))) == 429
