"""Graphs lowered for real, by the compiler's front end: what lowers, what is one text, what a start lacks.

Skipped as `test_cerebras_modelzoo.py` is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cerebras_modelzoo import run_there

from trainables.cerebras_backend import starting_weights, update_masks
from trainables.finetuning import setup
from trainables.pruning_stage import Pruned
from trainables.worker import WorkerCache
from tune_sparse.cerebras.environment import SiteEnvironment
from tune_sparse.cerebras.graphs import Graph
from tune_sparse.cerebras.job import examples_in_order, write_job
from tune_sparse.cerebras.preflight import matrix_shapes, run_child, write_graph
from tune_sparse.cerebras.sparsity import ChangingMasks
from tune_sparse.config import Cerebras, ScheduleSettings, SweepConfig
from tune_sparse.errors import RunError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.checkpoints import check_checkpoint, prunable_weights
from tune_sparse.sweep.graphs import plan_graphs
from tune_sparse.sweep.plan import make_plan

LEAVE_OUT = """
import sys, torch, cerebras.pytorch as cstorch
loaded = cstorch.load(sys.argv[1], map_location="cpu")["model"]
cstorch.save({"model": {name: t for name, t in loaded.items() if name != sys.argv[3]}}, sys.argv[2])
"""


def lowered(ledger: Ledger, config: SweepConfig, folder: Path, graph: Graph) -> dict[str, Any]:
    """Lower one graph, and read what the child found in its CIRH."""
    checkpoint = check_checkpoint(str(folder))
    target = Cerebras(cerebras_target="validate")
    return run_child(write_graph(config, checkpoint, graph, ledger, target), config.protocol.threads)


def small_config(folder: Path, **changes: Any) -> SweepConfig:
    small = {"n_train": 16, "n_selection": 4, "n_test": 4, "steps": 20, "global_batch_size": 4, "lora_rank": 4}
    names = {"models": str(folder), "data_dir": "synthetic", "backend": "cerebras", "cerebras_target": "validate"}
    return SweepConfig.from_names(names | small | changes)


@pytest.mark.modelzoo
@pytest.mark.parametrize(
    ("trained", "dropout"),
    [("adapters", 0.0), ("adapters", 0.05), ("masked adapters", 0.0), ("masked weights", 0.0), ("weights", 0.0)],
)
def test_each_kind_of_training_lowers_on_its_checkpoint(
    llama: Path, environment: SiteEnvironment, trained: str, dropout: float, tmp_path: Path
) -> None:
    told = None if trained == "weights" else 0.5
    graph = Graph(llama.name, trained, 32, told, "")
    config = small_config(llama, lora_dropout=dropout, modes="sparse-to-dense")
    report = lowered(Ledger(tmp_path), config, llama, graph)
    assert report["cirh_files"] == 1
    annotated_by_matrix = {"masked weights": 3, "weights": 0}.get(trained, 1)  # Adam's two moments beside it
    assert report["sparsity_annotations"] == annotated_by_matrix * len(matrix_shapes(llama))


@pytest.mark.modelzoo
@pytest.mark.parametrize(("annotation", "count"), [("none", 2), ("rounded", 3)])
def test_trainings_of_one_graph_lower_to_one_text_and_others_to_others(
    llama: Path, environment: SiteEnvironment, annotation: str, count: int, tmp_path: Path
) -> None:
    """Two methods, two tasks, two rates, two modes, one level and the dense model: as many texts as graphs."""
    texts: dict[Graph, set[str]] = {}
    for name, task, method, rate in (("a", "boolq", "unstructured", 1e-3), ("b", "gsm8k", "random", 2e-3)):
        changes = {"tasks": task, "methods": method, "sparsities": "0 0.5", "learning_rate": rate, "steps": len(task)}
        config = small_config(llama, **changes, sparsity_annotation=annotation, bucket_tokens="96")
        plan = make_plan(config)
        for graph in plan_graphs(plan).distinct(plan.runs.values()):
            report = lowered(Ledger(tmp_path / name), config, llama, graph)
            texts.setdefault(graph, set()).add(report["cirh_sha256"])
    assert all(len(found) == 1 for found in texts.values())
    assert len(texts) == len(set.union(*texts.values())) == count


@pytest.mark.modelzoo
@pytest.mark.parametrize(
    ("mode", "schedule"),
    [
        ("sparse-to-dense", "one-shot"),
        ("sparse-to-sparse", "one-shot"),
        *(("masked-finetuning", schedule) for schedule in ("one-shot", "gradual", "set", "rigl")),
    ],
)
def test_what_is_lowered_or_compiled_ahead_is_the_text_of_the_training(
    llama: Path, environment: SiteEnvironment, mode: str, schedule: str, tmp_path: Path
) -> None:
    """A training as it is written, and the graph that stands for it, hand the same text to the compiler."""
    rank = 16 if mode == "masked-finetuning" else 4
    method = "unstructured" if schedule == "gradual" else "random"
    config = small_config(llama, tasks="boolq", methods=method, sparsities="0.5", modes=mode, lora_rank=rank)
    if schedule != "one-shot":
        settings = {"gradual_updates": 4} if schedule == "gradual" else {"update_every": 3}
        config = replace(config, schedules=(schedule,), schedule_settings=ScheduleSettings(**settings))
    plan, ledger = make_plan(config), Ledger(tmp_path)
    [run], worker = plan.runs.values(), WorkerCache()
    graph = plan_graphs(plan).by_run[run.run_id]
    loaded = worker.model(run)
    examples = worker.examples(run, loaded)
    masks = worker.pruner.make_into(run, loaded, examples.train)
    pruned = Pruned(masks, masks.sha256, prunable_weights(loaded.model))
    trainable = setup(mode, loaded.model, run.protocol, update_masks(run, pruned), 0)
    folder, settings = tmp_path / "job", replace(config.cerebras, bucket_tokens=(graph.tokens,))
    folder.mkdir()
    tokens = examples_in_order(examples.train, run.protocol, 0, settings.bucket_tokens)
    start = replace(starting_weights(run, trainable, pruned), changing=ChangingMasks.from_run(run))
    write_job(folder, tokens, start, run.protocol, 0, settings, [])
    standing = write_graph(config, plan.checkpoints[run.cell.model], graph, ledger, settings)
    shutil.copy(standing / "base.json", folder)
    reports = [run_child(place, 1) for place in (folder, standing)]
    assert len({report["cirh_sha256"] for report in reports}) == 1
    assert reports[0]["sparsity_annotations"] >= len(matrix_shapes(llama))


@pytest.mark.modelzoo
def test_a_start_that_lacks_a_tensor_is_named(llama: Path, environment: SiteEnvironment, tmp_path: Path) -> None:
    """A lowering or compile loads no checkpoint, and would not see it."""
    config = small_config(llama)
    checkpoint, target = check_checkpoint(str(llama)), Cerebras(cerebras_target="validate")
    folder = write_graph(config, checkpoint, Graph(llama.name, "adapters", 32, 0.5, ""), Ledger(tmp_path), target)
    base = json.loads((folder / "base.json").read_text())
    lacking = tmp_path / "lacking.mdl"
    run_there(environment, LEAVE_OUT, base["checkpoint"], lacking, "ln_f.weight")
    (folder / "base.json").write_text(json.dumps(base | {"checkpoint": str(lacking)}))
    with pytest.raises(RunError, match=r"must have the tensors of the model, it differs in model\.ln_f\.weight"):
        run_child(folder, 1)
