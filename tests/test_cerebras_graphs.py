"""Which trainings share a compiled graph, and the lengths to which examples are padded so that more of them do."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from factories import make_cell, make_run
from hypothesis import given
from hypothesis import strategies as st

from trainables.cerebras_backend import CerebrasTraining
from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.cerebras.graphs import (
    COMPILE_SECONDS,
    Block,
    Graph,
    bucket_seconds,
    cheapest_buckets,
    graph_of_run,
)
from tune_sparse.cerebras.job import annotated_sparsities, padded_tokens
from tune_sparse.cerebras.preflight import prepare_cerebras
from tune_sparse.cli import main
from tune_sparse.config import Cell, Cerebras, SweepConfig
from tune_sparse.config.cerebras import SPARSITY_ANNOTATIONS
from tune_sparse.errors import InputError, RunError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.checkpoints import check_checkpoint
from tune_sparse.sweep.forecast import forecast
from tune_sparse.sweep.graphs import plan_graphs
from tune_sparse.sweep.plan import make_plan, requested_cells


def full_matrix() -> set[Cell]:
    """The cells that are trained of 2 models, 3 tasks, 3 methods, 10 levels and 2 modes."""
    config = SweepConfig(models=("a", "b"), backend=("cerebras",))
    return {cell.trained for cell in requested_cells(config)}


@pytest.mark.parametrize(("annotation", "count"), [("none", 4), ("rounded", 38), ("exact", 110)])
def test_the_full_matrix_in_one_bucket_has_few_graphs(annotation: str, count: int) -> None:
    trained = full_matrix()
    assert len(trained) == 330
    graphs = {graph_of_run(make_run(cell), 2048, annotation) for cell in trained}
    assert len(graphs) == count


@pytest.mark.parametrize(
    ("change", "is_shared"),
    [
        ({"seed": 3}, {"none", "rounded", "exact"}),
        ({"task": "gsm8k"}, {"none", "rounded", "exact"}),
        ({"method": "random"}, {"none", "rounded"}),
        ({"sparsity": 0.6}, {"none"}),
        ({"mode": "sparse-to-sparse"}, set()),
        ({"mode": "masked-finetuning"}, set()),
        ({"model": "other"}, set()),
    ],
)
def test_a_graph_is_shared_by_what_the_compiler_cannot_tell_apart(change: dict[str, Any], is_shared: set[str]) -> None:
    cell = make_cell(mode="sparse-to-dense", sparsity=0.5, method="unstructured")
    run, other = make_run(cell), make_run(replace(cell, **change))
    found = {kind for kind in SPARSITY_ANNOTATIONS if graph_of_run(run, 64, kind) == graph_of_run(other, 64, kind)}
    assert found == is_shared


def test_other_rates_and_more_steps_are_the_same_graph() -> None:
    run = make_run(make_cell())
    longer = replace(run, protocol=replace(run.protocol, steps=999, learning_rate=0.5, warmup_steps=7))
    assert graph_of_run(run, 64, "none") == graph_of_run(longer, 64, "none")
    deeper = replace(run, protocol=replace(run.protocol, lora_rank=3))
    assert graph_of_run(run, 64, "none") != graph_of_run(deeper, 64, "none")


def test_without_annotations_the_dense_model_and_its_sparse_to_dense_are_one_graph() -> None:
    dense, pruned = make_cell(mode="dense", sparsity=0.0), make_cell(mode="sparse-to-dense", sparsity=0.5)
    assert graph_of_run(make_run(dense), 64, "none") == graph_of_run(make_run(pruned), 64, "none")
    assert graph_of_run(make_run(dense), 64, "none") != graph_of_run(make_run(dense), 65, "none")


def block(longest: int, token_seconds: float, kinds: str) -> Block:
    return Block(longest, frozenset(Graph("m", kind, 0, None, "") for kind in kinds), token_seconds)


def test_lengths_are_shared_where_compiling_costs_more_than_padding() -> None:
    cheap, dear = COMPILE_SECONDS / 1000, COMPILE_SECONDS / 5
    assert cheapest_buckets([block(100, cheap, "ab"), block(110, cheap, "ab")]) == (110,)
    assert cheapest_buckets([block(110, dear, "a"), block(100, dear, "a")]) == (100, 110)
    assert cheapest_buckets([block(100, cheap, "a"), block(104, dear, "a"), block(500, dear, "a")]) == (104, 500)
    assert cheapest_buckets([]) == ()


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 3000), st.sampled_from(["a", "ab", "c"])), max_size=4))
def test_no_way_of_sharing_lengths_is_cheaper(drawn: list[tuple[int, float, str]]) -> None:
    blocks = [block(*parts) for parts in drawn]

    def seconds(buckets: tuple[int, ...]) -> float:
        held = {width: [b for b in blocks if padded_tokens(b.longest, buckets) == width] for width in buckets}
        return sum(bucket_seconds(own, width) for width, own in held.items() if own)

    chosen = cheapest_buckets(blocks)
    assert all(a < b for a, b in pairwise(chosen))
    longest = sorted({b.longest for b in blocks})
    for bits in range(2 ** max(0, len(longest) - 1)):
        other = tuple(n for at, n in enumerate(longest) if at == len(longest) - 1 or bits >> at & 1)
        assert seconds(chosen) <= seconds(other) * (1 + 1e-9)


def test_a_bucket_that_is_shorter_than_an_example_is_refused() -> None:
    assert padded_tokens(26, ()) == 26
    assert padded_tokens(26, (64, 32, 16)) == 32
    with pytest.raises(InputError, match=r"longest example, which has 26 tokens, the longest of bucket_tokens has 25"):
        padded_tokens(26, (16, 25))


def test_annotations_are_exact_rounded_or_left_out() -> None:
    found = {"q": 0.2998, "k": 0.3177}
    assert annotated_sparsities(found, 0.3, "exact") == found
    assert annotated_sparsities(found, 0.3, "rounded") == {"q": 0.3, "k": 0.3}
    assert annotated_sparsities(found, 0.3, "none") == {}
    assert annotated_sparsities({"q": 0.0}, 0.0, "rounded") == {}
    with pytest.raises(InputError, match=r"within 0\.1 of the sparsity of every matrix, k has 0\.4500.*exact, or none"):
        annotated_sparsities({"q": 0.3, "k": 0.45}, 0.3, "rounded")


def test_a_plan_counts_its_graphs_and_says_what_its_lengths_cost(llama: Path, site: Path, tmp_path: Path) -> None:
    names = {"models": str(llama), "tasks": "boolq gsm8k", "methods": "random", "sparsities": "0 0.3 0.5"}
    small = {"n_train": 16, "n_selection": 4, "n_test": 4, "data_dir": "synthetic", "backend": "cerebras"}
    plan = make_plan(SweepConfig.from_names(names | small | {"cerebras_target": "validate"}))
    planned = plan_graphs(plan)
    distinct = planned.distinct(plan.runs.values())
    assert len(planned.by_run) == 2 * (1 + 2 * 2)
    assert len(distinct) == 1 + 2 * 2
    assert len({graph.tokens for graph in distinct}) == 1
    [line] = planned.lines
    assert "boolq, gsm8k padded to" in line
    assert "5 graphs, saves 4.79 hours of compiling" in line
    on_csx = make_plan(SweepConfig.from_names(names | small))
    ledger = Ledger(tmp_path)
    found = forecast(on_csx, ledger, on_csx.missing(ledger))
    assert found.graphs == 5
    told = "Graphs to compile for a CS-3, each once: 5 (--sparsity-annotation), "
    assert (
        told + ("each when first trained (--compile-first), in 4.79 h if each takes as long as a published 7B")
        in found.lines()
    )
    known = replace(found, graph_seconds=600.0, compiles_first=True)
    assert f"{told}before the first training, with no CS-3 held (--compile-first), in 10 min" in known.lines()
    short = make_plan(SweepConfig.from_names(names | small | {"cerebras_target": "validate", "bucket_tokens": "8"}))
    with pytest.raises(InputError, match="a bucket must hold the longest example"):
        plan_graphs(short)


def test_what_compiles_first_trains_from_the_appliance_s_cache(
    llama: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in appliance keeps what it compiled: a second compile, and the training, find it."""
    monkeypatch.setattr("tune_sparse.cerebras.environment.CLUSTER_CONFIG", site)
    small = {"n_train": 16, "n_selection": 4, "n_test": 4, "steps": 4, "global_batch_size": 4, "lora_rank": 4}
    names = {"models": str(llama), "tasks": "boolq", "methods": "random", "sparsities": "0.5"}
    names |= {"compile_first": "true", "modes": "sparse-to-dense"}
    where = {"data_dir": "synthetic", "backend": "cerebras", "results_dir": str(tmp_path)}
    plan, ledger = make_plan(SweepConfig.from_names(names | small | where)), Ledger(tmp_path)
    planned, told = plan_graphs(plan), []
    graphs = planned.distinct(plan.runs.values())
    for _ in range(2):
        prepare_cerebras(plan.config, plan.checkpoints, graphs, ledger, told.append)
    lines = [line for line in told if "in the queue" in line]
    assert ["compiled in" in line for line in lines] == [True, False]
    assert ["found in the appliance's cache" in line for line in lines] == [False, True]
    [run] = plan.runs.values()
    settings = replace(plan.config.cerebras, bucket_tokens=(planned.by_run[run.run_id].tokens,))
    for _ in run_cell(run, ledger, WorkerCache(), CerebrasTraining(settings)):
        pass
    record = ledger.record(run.run_id)
    assert record is not None
    assert record.status == "done", record.error
    assert (record.measured["compiles"], record.measured["cached_compiles"]) == (1, 1)
    assert "zeros were sent in frozen weights" in (ledger.run_folder(run.run_id) / "train.log").read_text()


def test_a_compile_that_is_lost_is_left_to_the_training_and_a_refused_one_ends_the_sweep(
    llama: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_sparse.cerebras.environment.CLUSTER_CONFIG", site)
    names = {"models": str(llama), "tasks": "boolq", "data_dir": "synthetic", "backend": "cerebras"}
    config, ledger = SweepConfig.from_names(names | {"compile_first": "true"}), Ledger(tmp_path)
    graph = Graph(llama.name, "adapters", 32, None, "")
    checkpoints = {llama.name: check_checkpoint(str(llama))}
    told: list[str] = []
    (site / "fault").write_text("busy")
    prepare_cerebras(config, checkpoints, [graph], ledger, told.append)
    assert "not compiled ahead: " in told[-1]
    (site / "fault").write_text("refused")
    with pytest.raises(RunError, match="the compiler refused the graph"):
        prepare_cerebras(config, checkpoints, [graph], ledger, told.append)


@pytest.mark.parametrize("chosen", [{"compile_first": True}, {"cerebras_target": "compile"}])
def test_what_is_known_only_after_pruning_cannot_be_compiled_before(chosen: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="sparsity_annotation must be rounded or none to compile before a training"):
        Cerebras(sparsity_annotation="exact", **chosen)


def test_compile_fills_the_cache_graph_by_graph_and_trains_nothing(
    llama: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tune_sparse.cerebras.environment.CLUSTER_CONFIG", site)
    arguments = ["--tasks", "boolq", "--methods", "random", "--sparsities", "0.5", "--set", "n_train=16"]
    where = ["--models", str(llama), "--data-dir", "synthetic", "--results-dir", str(tmp_path / "results")]
    target = ["--backend", "cerebras", "--cerebras-target", "compile", "--json"]
    assert main(["sweep", "smoke", *where, *arguments, *target]) == 0
    compiled = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["graph"]["trained"] for line in compiled] == ["adapters", "masked adapters"]
    assert all(line["seconds"] > 0 and not line["is_cached"] for line in compiled)
    assert not list((tmp_path / "results").glob("runs/*"))
    jobs = [json.loads(path.read_text()) for path in (tmp_path / "results").rglob("job.json")]
    assert all(job["compile_only"] and job["target"] == "csx" and job["masks"] is None for job in jobs)
