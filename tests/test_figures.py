"""Every figure, drawn once on a small ledger: what it shows is there, and what has nothing to show is not drawn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from changing_masks import ledger_of_changing_masks
from matplotlib.figure import Figure
from PIL import Image
from sound import MATRICES, edit, make_cells, sound_ledger

from analysis.read.load import COLUMNS, cells_table
from analysis.read.results import read_results
from analysis.report.dynamics_figures import DYNAMICS_FIGURES
from analysis.report.figures import FIGURES, GIGA
from analysis.report.plots import plot_over_sparsity
from analysis.report.runs import Runs, find_runs
from analysis.report.style import LABELS, save
from tune_sparse.files import write_json
from tune_sparse.ledger.ledger import Ledger

WITHOUT_DATA = {"sparsity_vs_perplexity", *DYNAMICS_FIGURES}
"""No cell of this ledger is of a text, or trained under masks that change."""


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Two methods, two modes, three sparsities; one throughput measurement; one search."""
    ledger = sound_ledger(tmp_path_factory.mktemp("results"))
    [sweep] = ledger.sweeps()
    points = [
        {"batch_size": size, "train_examples_per_second": 10.0 * size, "train_tokens_per_second": 100.0 * size}
        | {"peak_memory_bytes": None}
        for size in (1, 2, 4)
    ]
    points.append({"batch_size": 8, "train_examples_per_second": None, "train_tokens_per_second": None})
    (ledger.folder / "throughput").mkdir()
    run_id = sweep.cells[-1]["run_id"]
    write_json(ledger.folder / "throughput" / "one.json", {"run_id": run_id, "by_batch_size": points})
    searched = ledger.folder / "searches" / "one"
    searched.mkdir(parents=True)
    described = {"model": "tiny", "task": "boolq", "method": "wanda", "sparsity": 0.5, "sampler": "nsga2"}
    write_json(searched / "config.json", described)
    front = [{"parameters_fraction": f, "accuracy": a} for f, a in ((1.0, 0.9), (0.5, 0.8))]
    write_json(searched / "result.json", {"front": front})
    (ledger.folder / "searches" / "unfinished").mkdir()
    return ledger


@pytest.fixture(scope="module")
def cells(ledger: Ledger) -> pd.DataFrame:
    return cells_table([ledger.folder])


@pytest.fixture(scope="module")
def runs(ledger: Ledger) -> Runs:
    found = read_results([ledger.folder]).by_run
    return find_runs([ledger.folder], {run_id: e.predictions for run_id, e in found.items() if e.predictions})


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def drawn(name: str, cells: pd.DataFrame, runs: Runs) -> Figure:
    figure = FIGURES[name].draw(cells, runs)
    assert figure is not None
    return figure


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Runs]:
    """Cells and runs whose masks changed while they trained."""
    folder = ledger_of_changing_masks(tmp_path_factory.mktemp("changing")).folder
    return cells_table([folder]), find_runs([folder])


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - {"sparsity_vs_perplexity"}))
def test_a_figure_has_units_and_titles_that_do_not_overlap(
    name: str, cells: pd.DataFrame, runs: Runs, changing: tuple[pd.DataFrame, Runs]
) -> None:
    figure = drawn(name, *changing) if name in DYNAMICS_FIGURES else drawn(name, cells, runs)
    figure.draw_without_rendering()
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert panels
    assert any(axis.get_xlabel() for axis in panels)
    assert any(axis.get_ylabel() for axis in figure.axes)
    boxes = [text.get_window_extent() for axis in panels for text in axis.get_xticklabels() if text.get_text()]
    for first, second in pairwise(boxes):
        assert not first.overlaps(second) or abs(first.y0 - second.y0) > 5, name
    for text in [axis.title for axis in panels] + [axis.xaxis.label for axis in panels]:
        box = text.get_window_extent()
        assert box.x0 >= -1
        assert box.x1 <= figure.bbox.width + 1


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_without_a_finished_run_nothing_is_drawn(name: str, tmp_path: Path) -> None:
    empty = pd.DataFrame(columns=list(COLUMNS)).astype({"accuracy": float, "sparsity": float})
    assert FIGURES[name].draw(empty, find_runs([tmp_path])) is None


def test_without_texts_there_is_no_perplexity(cells: pd.DataFrame, runs: Runs) -> None:
    assert all(FIGURES[name].draw(cells, runs) is None for name in WITHOUT_DATA)


def test_accuracy_is_drawn_with_the_dense_baseline_chance_and_before_tuning(cells: pd.DataFrame, runs: Runs) -> None:
    figure = drawn("sparsity_vs_accuracy", cells, runs)
    [axis] = figure.axes
    levels = {float(line.get_ydata()[0]) for line in axis.lines if len(set(line.get_ydata())) == 1}  # type: ignore[arg-type]
    assert 0.5 in levels
    assert cells.loc[cells["sparsity"] == 0, "accuracy"].iloc[0] in levels
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["unstructured", "random"]
    assert {"before tuning", "dense baseline", "chance", "± standard error over examples (one seed)"} <= set(names)
    assert len(axis.collections) == 4, "a band for each method and mode"


def test_perplexities_within_a_decade_are_plain_numbers(cells: pd.DataFrame) -> None:
    figure = plot_over_sparsity(cells.assign(perplexity=[6.7 + 0.1 * i for i in range(len(cells))]), "perplexity")
    assert figure is not None
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].yaxis.get_minorticklabels()]
    assert "7" in labels
    assert [label for label in labels if "$" in label] == []


def test_what_is_pruned_in_training_has_no_line_before_tuning(cells: pd.DataFrame) -> None:
    """Its model before tuning is the unpruned one; from scratch that is noise, far from all that was learned."""
    figure = plot_over_sparsity(cells.assign(schedule="gradual"), "accuracy")
    assert figure is not None
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "before tuning" not in names
    assert [line for axis in figure.axes for line in axis.lines if line.get_linestyle() == ":"] == []


def test_the_heatmap_shows_each_cell_once(cells: pd.DataFrame, runs: Runs) -> None:
    figure = drawn("method_comparison_heatmap", cells, runs)
    axis = figure.axes[0]
    assert len(axis.texts) == 12
    rows = cells.set_index(["method", "mode", "sparsity"])["accuracy"]
    [shown] = [t.get_text() for t in axis.texts if t.get_position() == (2, 3)]
    assert [t.get_text() for t in axis.get_yticklabels()][3] == "random, sparse-to-sparse"
    assert float(shown) == pytest.approx(rows["random", "sparse-to-sparse", 0.6], abs=0.005 + 1e-9)


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """One method at two sparsities, with three seeds."""
    seeds = [make_cells(methods=("random",), sparsities=(0.0, 0.3), seed=seed) for seed in (0, 1, 2)]
    return sound_ledger(tmp_path_factory.mktemp("seeds"), [cell for cells in seeds for cell in cells])


def test_several_seeds_have_a_band_of_their_deviation_around_their_mean(seeded: Ledger) -> None:
    cells, runs = cells_table([seeded.folder]), find_runs([seeded.folder])
    figure = drawn("sparsity_vs_accuracy", cells, runs)
    [axis] = figure.axes
    of = cells[(cells["sparsity"] == 0.3) & (cells["mode"] == "sparse-to-dense")]["accuracy"]
    assert axis.lines[0].get_ydata()[1] == pytest.approx(of.mean())  # type: ignore[index]
    ends = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert any(end == pytest.approx(of.mean() + of.std()) for end in ends)
    assert "± standard deviation between 3 seeds" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_mode_difference_of_several_seeds_is_their_mean_and_deviation(seeded: Ledger) -> None:
    """All seeds, and not the interval of one of them."""
    cells, runs = cells_table([seeded.folder]), find_runs([seeded.folder])
    figure = drawn("mode_difference", cells, runs)
    [axis] = figure.axes
    rows = cells[cells["sparsity"] == 0.3].pivot(index="seed", columns="mode", values="accuracy")
    differences = rows["sparse-to-sparse"] - rows["sparse-to-dense"]
    assert axis.lines[1].get_ydata()[0] == pytest.approx(differences.mean())  # type: ignore[index]
    ends = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(ends), max(ends)) == pytest.approx(
        (differences.mean() - differences.std(), differences.mean() + differences.std())
    )
    assert "± standard deviation between 3 seeds" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_layers_and_operations_are_those_of_all_seeds(seeded: Ledger, tmp_path: Path) -> None:
    shutil.copytree(seeded.folder, tmp_path, dirs_exist_ok=True)
    cells = cells_table([tmp_path])
    last = cells[(cells["seed"] == 2) & (cells["sparsity"] == 0.3)]
    for run_id in last["run_id"]:
        path = tmp_path / "runs" / run_id
        edit(path / "sparse_config.json", kept_by_matrix={matrix: [400, 1000] for matrix in MATRICES})
        edit(path / "result.json", metrics={"inference_flops": {"2048": 5_000}})
    runs = find_runs([tmp_path])
    assert {text.get_text() for text in drawn("per_layer_sparsity", cells, runs).axes[0].texts} == {"0.40"}
    [axis] = drawn("flops_vs_sequence_length", cells_table([tmp_path]), runs).axes
    assert axis.lines[1].get_ydata()[0] == pytest.approx(3_000 / GIGA)  # type: ignore[index]


def test_the_mode_difference_is_of_pairs_at_the_same_sparsity(cells: pd.DataFrame, runs: Runs) -> None:
    [axis] = drawn("mode_difference", cells, runs).axes
    rows = cells.set_index(["method", "mode", "sparsity"])["accuracy"].sort_index()
    curve = next(line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")  # type: ignore[arg-type]
    under, after = (rows["unstructured", mode].loc[[0.3, 0.6]] for mode in ("sparse-to-sparse", "sparse-to-dense"))
    assert list(curve.get_ydata()) == pytest.approx(list(under - after))  # type: ignore[arg-type]


def test_layers_show_counted_sparsity(cells: pd.DataFrame, runs: Runs) -> None:
    axes = [axis for axis in drawn("per_layer_sparsity", cells, runs).axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == ["tiny, unstructured", "tiny, random"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["q", "up"]
    assert {text.get_text() for text in axes[0].texts} == {"0.60"}


def test_a_batch_size_that_did_not_fit_has_no_point(cells: pd.DataFrame, runs: Runs) -> None:
    [axis] = drawn("throughput_vs_batch_size", cells, runs).axes
    [line] = axis.lines
    assert list(line.get_xdata()) == [1, 2, 4]  # type: ignore[arg-type]
    assert axis.get_ylabel() == LABELS["train_tokens_per_second"]


def test_panels_of_different_rates_all_fit(cells: pd.DataFrame, ledger: Ledger, tmp_path: Path) -> None:
    fast = cells.iloc[-1:].assign(model="fast", run_id="fast")
    (tmp_path / "throughput").mkdir()
    points = [{"batch_size": size, "train_tokens_per_second": 1e5 * size} for size in (1, 2)]
    write_json(tmp_path / "throughput" / "fast.json", {"run_id": "fast", "by_batch_size": points})
    figure = drawn("throughput_vs_batch_size", pd.concat([cells, fast]), find_runs([ledger.folder, tmp_path]))
    assert [axis.get_title() for axis in figure.axes] == ["fast", "tiny"]
    assert all(axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 2e5 for axis in figure.axes)


def test_a_front_goes_from_the_smallest_adapter_to_the_largest(cells: pd.DataFrame, runs: Runs) -> None:
    [axis] = drawn("sub_adapter_fronts", cells, runs).axes
    [line] = axis.lines
    assert list(line.get_xdata()) == [0.5, 1.0]  # type: ignore[arg-type]


def test_a_figure_is_saved_for_the_screen_and_for_print(cells: pd.DataFrame, runs: Runs, tmp_path: Path) -> None:
    save(drawn("flops_vs_sequence_length", cells, runs), tmp_path / "flops.png")
    with Image.open(tmp_path / "flops.png") as image:
        assert min(image.size) > 300
    assert (tmp_path / "flops.pdf").read_bytes().startswith(b"%PDF")
    assert {path.name for path in tmp_path.iterdir()} == {"flops.png", "flops.pdf"}


def test_of_several_folders_the_one_that_finished_a_run_counts(ledger: Ledger, tmp_path: Path) -> None:
    run_id = ledger.sweeps()[0].cells[0]["run_id"]
    (tmp_path / "runs" / run_id).mkdir(parents=True)
    both = find_runs([tmp_path, ledger.folder])
    assert both.find_run_folder(run_id) == ledger.run_folder(run_id)
    assert both.find_run_folder("no run") is None
    assert both.record("no run") is None
    assert len(make_cells()) == 12


def test_no_line_goes_over_a_sparsity_that_was_not_run(tmp_path: Path) -> None:
    cells = cells_table([sound_ledger(tmp_path, make_cells(sparsities=(0.0, 0.3, 0.5, 0.7))).folder])
    cells.loc[cells["sparsity"] == 0.5, "accuracy"] = np.nan
    figure = plot_over_sparsity(cells, "accuracy")
    assert figure is not None
    marked = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert marked
    for line in marked:
        x, y = line.get_data()
        assert list(x) == [0.0, 0.3, 0.5, 0.7]
        assert list(np.isnan(y)) == [False, False, True, False]
