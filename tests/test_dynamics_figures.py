"""Figures and the table of masks that change while models train."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from changing_masks import NAMES, STEPS, ledger_of_changing_masks
from matplotlib.axes import Axes

from analysis.read.dynamics import IMPOSSIBLE, RunDynamics, dynamics_table
from analysis.read.load import cells_table
from analysis.report.dynamics_figures import DYNAMICS_FIGURES, short_names
from analysis.report.dynamics_rows import dynamics_rows
from analysis.report.report import write_report
from analysis.report.runs import Runs, find_runs
from tune_sparse.ledger.ledger import Ledger


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return ledger_of_changing_masks(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def cells(ledger: Ledger) -> pd.DataFrame:
    return cells_table([ledger.folder])


@pytest.fixture(scope="module")
def runs(ledger: Ledger) -> Runs:
    return find_runs([ledger.folder])


@pytest.fixture(scope="module")
def found(cells: pd.DataFrame, runs: Runs) -> dict[tuple[str, float], RunDynamics]:
    """{(schedule, sparsity): records}"""
    known = runs.dynamics(cells["run_id"]).values()
    return {(d.run.cell.schedule, d.run.cell.sparsity): d for d in known}


def panels_of(name: str, cells: pd.DataFrame, runs: Runs) -> dict[str, Axes]:
    """{schedule: panel}"""
    figure = DYNAMICS_FIGURES[name][1](cells, runs)
    assert figure is not None
    return {axis.get_title().rpartition(", ")[2]: axis for axis in figure.axes if axis.get_title()}


def test_only_runs_whose_masks_changed_have_a_panel_over_steps(cells: pd.DataFrame, runs: Runs) -> None:
    assert list(panels_of("sparsity_over_steps", cells, runs)) == ["gradual", "rigl"]
    assert list(panels_of("eval_loss_over_steps", cells, runs)) == ["gradual", "one-shot", "rigl"]


def test_sparsity_is_a_line_a_level_with_its_target_and_three_phases(
    cells: pd.DataFrame, runs: Runs, found: dict[tuple[str, float], RunDynamics]
) -> None:
    axis = panels_of("sparsity_over_steps", cells, runs)["gradual"]
    curves = [line for line in axis.lines if len(line.get_xdata()) > 2]
    targets = [line.get_ydata()[0] for line in axis.lines if len(line.get_xdata()) == 2]
    assert targets == [0.5, 0.9]
    lines = found["gradual", 0.9].lines
    assert list(curves[1].get_ydata()) == [line["sparsity/overall"] for line in lines]
    updates = [line["step"] for line in lines if line["is_update"]]
    ends = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]
    assert ends == [(0, updates[0]), (updates[0], updates[-1]), (updates[-1], STEPS)]


def test_revival_is_drawn_at_updates_and_said_to_be_impossible(
    cells: pd.DataFrame, runs: Runs, found: dict[tuple[str, float], RunDynamics]
) -> None:
    panels = panels_of("revival_rate", cells, runs)
    assert [text.get_text() for text in panels["gradual"].texts] == [f"revival: {IMPOSSIBLE}"]
    assert not panels["gradual"].lines
    updates = found["rigl", 0.5].updates
    assert list(panels["rigl"].lines[0].get_ydata()) == [line["weight_revival/rate"] for line in updates]


def test_two_matrices_have_two_names() -> None:
    llama = [f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj")]
    gpt2 = [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert short_names(llama) == ["1 q", "1 up"]
    assert short_names(gpt2) == ["0 c_attn", "0 attn.c_proj", "0 c_fc", "0 mlp.c_proj"]


def test_no_bar_leaves_its_panel(cells: pd.DataFrame, runs: Runs) -> None:
    panels = panels_of("dead_outputs", cells, runs).values()
    highest = max(bar.get_height() for axis in panels for bar in axis.patches)
    assert highest > 0
    assert all(axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > highest for axis in panels)


def test_bars_are_a_matrix_each_and_the_mean_of_seeds(tmp_path: Path) -> None:
    folder = ledger_of_changing_masks(tmp_path, ("set",), (0.9,), seeds=(0, 1)).folder
    cells, runs = cells_table([folder]), find_runs([folder])
    axis = panels_of("dead_outputs", cells, runs)["set"]
    name = next(iter(NAMES))
    shares = [d.lines[-1][f"dead_neurons/{name}.out"] for d in runs.dynamics(cells["run_id"]).values()]
    assert [label.get_text() for label in axis.get_xticklabels()][:3] == ["0 q", "0 o", "0 up"]
    assert axis.patches[0].get_height() == pytest.approx(sum(shares) / 2)
    assert len(axis.patches) == len(NAMES)


def test_the_table_says_how_masks_ended(
    cells: pd.DataFrame, runs: Runs, found: dict[tuple[str, float], RunDynamics]
) -> None:
    table = dynamics_table(cells, runs.dynamics(cells["run_id"])).set_index(["schedule", "sparsity"])
    last = found["rigl", 0.9].lines[-1]
    row = table.loc[("rigl", 0.9)]
    assert (row["revived"], row["updates"]) == (last["weight_revival/total"], 5)
    assert row["effective_rank"] == last["effective_rank/average"]
    assert row["score"] == cells.set_index("run_id").loc[row["run_id"], "accuracy"]
    rows = dynamics_rows(table.reset_index())
    assert [row["revived"] == IMPOSSIBLE for row in rows] == [True] * 4 + [False] * 2


def test_a_report_has_the_table_as_long_as_a_run_has_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.report.presentation.FIGURES", {})
    ledger = ledger_of_changing_masks(tmp_path, ("rigl",), (0.5,))
    write_report([tmp_path])
    page, table = tmp_path / "analysis" / "report.html", tmp_path / "analysis" / "dynamics.csv"
    assert "Masks while weights were trained" in page.read_text()
    assert len(pd.read_csv(table)) == 1
    for path in ledger.folder.glob("runs/*/dynamics.jsonl"):
        path.unlink()
    write_report([tmp_path])
    assert "Masks while weights were trained" not in page.read_text()
    assert not table.exists()
