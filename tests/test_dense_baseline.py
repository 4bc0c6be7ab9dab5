"""The dense baseline of a curve: of all LoRA modes one, of a mode that trains the weights themselves its own."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from sound import sound_ledger

from analysis.audit.audit import audit
from analysis.read.load import cells_table
from analysis.read.results import read_results
from analysis.read.seeds import over_seeds
from analysis.report.plots import plot_over_sparsity
from analysis.report.report import highest_lines
from analysis.report.result_table import finished_cells
from analysis.stats.comparisons import Points
from analysis.stats.findings import make_claims
from tune_sparse.config import Cell
from tune_sparse.modes import MODES, dense_mode

MASKED, LORA = "masked-finetuning", "sparse-to-sparse"
ACCURACY = {(MASKED, 0.0): 1.0, ("dense", 0.0): 0.0, (LORA, 0.0): 0.0, (MASKED, 0.5): 0.0, (LORA, 0.5): 1.0}


def points_of(folder: Path, *modes: str) -> tuple[Points, pd.DataFrame, pd.DataFrame]:
    cells = [
        Cell("tiny", "boolq", "unstructured", sparsity, mode, seed, "torch")
        for mode in modes
        for sparsity in (0.0, 0.5)
        for seed in (0, 1, 2)
    ]
    ledger = sound_ledger(folder, cells, accuracy=lambda cell: ACCURACY[cell.mode, cell.sparsity])
    results = read_results([ledger.folder])
    predictions = {run: e.predictions for run, e in results.by_run.items() if e.predictions}
    table = cells_table([ledger.folder])
    return Points(table, predictions), table, finished_cells(table, audit(results))


def losses(finished: pd.DataFrame) -> dict[str, float]:
    pruned = finished[finished["sparsity"] > 0]
    return dict(zip(pruned["mode"], pruned["difference"], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_baseline_is_of_the_mode_that_trains_cells_without_zeros(mode: str) -> None:
    assert Cell("m", "t", "unstructured", 0.0, mode, 0, "torch").trained.mode == dense_mode(mode)


def test_weights_that_are_trained_themselves_have_a_baseline_without_any_lora_mode(tmp_path: Path) -> None:
    points, table, finished = points_of(tmp_path, MASKED)
    assert len(points.to_dense(0.5)) == 3
    assert losses(finished) == {MASKED: -1.0}
    assert finished.loc[finished["sparsity"] == 0, ["method", "mode"]].to_numpy().tolist() == [["none", MASKED]]
    claims = [claim for claim in make_claims(points)[0] if claim.question == "RQ1"]
    assert any(claim.text.startswith("Dense: 1.000") for claim in claims)
    assert {claim.about for claim in claims} > {f"torch, tiny, boolq, {MASKED}"}
    assert any(f"tiny, boolq by {MASKED} (dense accuracy 1.000)" in line for line in highest_lines(over_seeds(table)))


def test_no_mode_is_compared_with_the_baseline_of_another(tmp_path: Path) -> None:
    points, table, finished = points_of(tmp_path, MASKED, LORA)
    pairs = points.to_dense(0.5)
    dense = table.set_index("run_id")["mode"]
    assert sorted(zip(pairs["mode"], (dense_mode(dense[run]) for run in pairs["run_id_left"]), strict=True)) == [
        *[(MASKED, MASKED)] * 3,
        *[(LORA, "dense")] * 3,
    ]
    assert losses(finished) == {MASKED: -1.0, LORA: 1.0}
    said = {claim.about: claim.text for claim in make_claims(points)[0] if claim.text.startswith("Dense: ")}
    assert said["torch, tiny, boolq"].startswith("Dense: 0.000")
    assert said[f"torch, tiny, boolq, {MASKED}"].startswith("Dense: 1.000")
    figure = plot_over_sparsity(table, "accuracy")
    assert figure is not None
    heights = {line.get_ydata()[0] for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1}
    assert {0.0, 1.0} <= heights
