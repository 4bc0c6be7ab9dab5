"""The faults that the audit must find: each is planted into a sound ledger."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sound import PROTOCOL, edit, make_outcomes, sound_ledger, sound_run, splits, write_sound

from analysis.read.imported import Imported
from tune_sparse.config import Cell
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.evaluation.outcomes import write_outcomes
from tune_sparse.files import write_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.training.budgets import CPU_BUDGETS

A_CELL = Cell("tiny", "boolq", "unstructured", 0.3, "sparse-to-dense", 0, "torch")
A_RUN = sound_run(A_CELL)
ANOTHER = sound_run(replace(A_CELL, mode="sparse-to-sparse"))
DENSE = Cell("tiny", "boolq", "none", 0.0, "dense", 0, "torch")


def run_folder_in(ledger: Ledger, run: object = A_RUN) -> Path:
    return ledger.run_folder(run.run_id)  # type: ignore[attr-defined]


def rewritten(ledger: Ledger, **changes: object) -> None:
    shutil.rmtree(run_folder_in(ledger))
    write_sound(ledger, A_RUN, **changes)  # type: ignore[arg-type]


def unreadable(ledger: Ledger) -> None:
    (ledger.folder / "runs" / "notes").mkdir()


def identity(ledger: Ledger) -> None:
    path = run_folder_in(ledger) / "config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.0003", "learning_rate: 0.0004"))


def checksum(ledger: Ledger) -> None:
    edit(run_folder_in(ledger) / "validation_report.json", mask_sha256="f" * 64)


RANDOM_RUN = sound_run(replace(A_CELL, method="random"))


def pruning_folder_in(ledger: Ledger) -> Path:
    return ledger.pruning_folder(str(RANDOM_RUN.pruning_id))


def pruning(ledger: Ledger) -> None:
    (pruning_folder_in(ledger) / "masks.safetensors").write_bytes(b"?" * 64)


def pruning_gone(ledger: Ledger) -> None:
    shutil.rmtree(pruning_folder_in(ledger))


def duplicate_results(ledger: Ledger) -> None:
    shutil.copy(run_folder_in(ledger, ANOTHER) / "metrics.jsonl", run_folder_in(ledger))
    last = json.loads((run_folder_in(ledger) / "metrics.jsonl").read_text().splitlines()[-1])
    edit(run_folder_in(ledger) / "result.json", metrics={"train_loss": last["train_loss"]})


def no_effect(ledger: Ledger) -> None:
    edit(run_folder_in(ledger) / "result.json", metrics={"update_removed_fraction": 0.0})


def off_target(ledger: Ledger) -> None:
    edit(run_folder_in(ledger) / "result.json", metrics={"actual_sparsity": 0.28})


def zeros_lost(ledger: Ledger) -> None:
    zeros = {"model.layers.0.mlp.up_proj.weight": [299, 1000]}
    edit(run_folder_in(ledger) / "validation_report.json", zeros_by_matrix=zeros)


def mixed_versions(ledger: Ledger) -> None:
    edit(run_folder_in(ledger) / "result.json", environment={"git_sha": "d" * 40})


def trained_with(ledger: Ledger, cell: Cell, **settings: object) -> Run:
    """The run of a cell, made anew under another protocol: an earlier sweep of the folder had it."""
    run = sound_run(cell, replace(PROTOCOL, **settings))  # type: ignore[arg-type]
    [path] = (ledger.folder / "sweeps").glob("*.json")
    cells = json.loads(path.read_text())["cells"]
    ids = {"run_id": run.run_id, "pruning_id": run.pruning_id}
    own = [c for c in cells if Cell(**{name: c[name] for name in vars(cell)}).trained == cell]
    shutil.rmtree(ledger.run_folder(own[0]["run_id"]))
    edit(path, cells=[c | ids if c in own else c for c in cells])
    write_sound(ledger, run)
    return run


def protocol(ledger: Ledger) -> None:
    trained_with(ledger, DENSE, steps=10)


def overlap(ledger: Ledger) -> None:
    task = TASKS["boolq"]
    assert isinstance(task, PromptTask)
    outcomes = make_outcomes(A_RUN, 0.86)
    outcomes[7] = replace(outcomes[7], id=task.question_id(splits(PROTOCOL).train[3]))
    write_outcomes(run_folder_in(ledger) / "examples.parquet", outcomes)


def counted_twice(ledger: Ledger) -> None:
    [path] = (ledger.folder / "sweeps").glob("*.json")
    edit(path, cells=[cell | {"shared_with": None} for cell in json.loads(path.read_text())["cells"]])


def unproven_number(ledger: Ledger) -> None:
    edit(run_folder_in(ledger) / "result.json", metrics={"accuracy": 0.99})


def measured_elsewhere(ledger: Ledger) -> None:
    """As `throughput --backend cerebras` wrote it when it measured torch."""
    (ledger.folder / "throughput").mkdir()
    rates = {"batch_size": 8, "train_examples_per_second": 327.7, "train_tokens_per_second": 8000.0}
    value = {"run_id": "cerebras_tiny_boolq_s50_dense_12345678", "by_batch_size": [rates], "environment": {}}
    write_json(ledger.folder / "throughput" / "one.json", value)
    right = value | {"measured_on": {"backend": "cerebras", "target": "csx", "release": "2.10.0"}}
    write_json(ledger.folder / "throughput" / "two.json", right)


def conflict(ledger: Ledger) -> None:
    other = ledger.folder.parent / "other"
    shutil.copytree(run_folder_in(ledger), other / "runs" / A_RUN.run_id)
    edit(other / "runs" / A_RUN.run_id / "result.json", metrics={"eval_loss": 0.25})


def at_chance(ledger: Ledger) -> None:
    rewritten(ledger, accuracy=0.45)


def constant_prediction(ledger: Ledger) -> None:
    """The commonest answer nearly always, and right where it is not given."""
    golds = {o.id: str(o.gold) for o in make_outcomes(A_RUN, 1.0)}
    usual, _ = Counter(golds.values()).most_common(1)[0]
    others = [name for name, gold in golds.items() if gold != usual][:12]
    rewritten(ledger, answers=dict.fromkeys(golds, usual) | {name: golds[name] for name in others})


def same_answers(ledger: Ledger) -> None:
    rewritten(ledger, answers={o.id: str(o.predicted) for o in make_outcomes(ANOTHER, 0.86)})


def modes_coincide(ledger: Ledger) -> None:
    kept = {"model.layers.0.self_attn.q_proj.weight": 1.0, "model.layers.0.mlp.up_proj.weight": 0.8}
    for mode in ("sparse-to-dense", "sparse-to-sparse"):
        run = sound_run(replace(A_CELL, method="structured", sparsity=0.1, mode=mode))
        write_sound(ledger, run, kept=kept, weights_sha256="e" * 64)


def few_examples(ledger: Ledger) -> None:
    shutil.rmtree(ledger.folder)
    sound_ledger(ledger.folder, protocol=replace(PROTOCOL, n_test=200))


def answers_cut(ledger: Ledger) -> None:
    edit(run_folder_in(ledger) / "result.json", metrics={"cut_fraction": 0.06})


def few_steps(ledger: Ledger) -> None:
    shutil.rmtree(ledger.folder)
    sound_ledger(ledger.folder, protocol=replace(PROTOCOL, steps=6, eval_every=6))


def dead_neurons(ledger: Ledger) -> None:
    dead = {"dead_neurons/average.out": 0.1, "dead_neurons/average.in": 0.6}
    edit(run_folder_in(ledger) / "result.json", metrics={"dynamics": dead})


def few_calibration_tokens(ledger: Ledger) -> None:
    few = {"calibration_tokens_seen": 2400, "calibration_tokens_per_input": 0.22}
    for mode in ("sparse-to-dense", "sparse-to-sparse"):
        write_sound(ledger, sound_run(replace(A_CELL, method="sparsegpt", mode=mode)), **few)


def missing(ledger: Ledger) -> None:
    shutil.rmtree(run_folder_in(ledger))


def hardware(ledger: Ledger) -> None:
    edit(run_folder_in(ledger) / "result.json", environment={"hardware": "slide rule"})


def budgets(ledger: Ledger) -> None:
    for path in ledger.folder.glob("runs/*/result.json"):
        edit(path, measured={"budgets": CPU_BUDGETS.as_record()})
    other = replace(CPU_BUDGETS, micro_batch_tokens=1024)
    edit(run_folder_in(ledger) / "result.json", measured={"budgets": other.as_record()})


def uncommitted(ledger: Ledger) -> None:
    for path in ledger.folder.glob("runs/*/result.json"):
        edit(path, environment={"git_sha": "c" * 40 + "-dirty"})


def unchecked(ledger: Ledger) -> None:
    path = run_folder_in(ledger) / "result.json"
    content = json.loads(path.read_text())
    del content["metrics"]["weights_sha256"]
    write_json(path, content)


def imported(ledger: Ledger) -> None:
    (ledger.folder / "imported").mkdir()
    record = Imported("tiny", "boolq", 0.93, "our earlier study")
    write_json(ledger.folder / "imported" / "one.json", vars(record))


PLANTED: dict[str, Callable[[Ledger], None]] = {
    "unreadable": unreadable,
    "identity": identity,
    "checksum": checksum,
    "pruning": pruning,
    "duplicate-results": duplicate_results,
    "no-effect": no_effect,
    "off-target": off_target,
    "zeros-lost": zeros_lost,
    "mixed-versions": mixed_versions,
    "protocol": protocol,
    "overlap": overlap,
    "counted-twice": counted_twice,
    "unproven-number": unproven_number,
    "measured-elsewhere": measured_elsewhere,
    "conflict": conflict,
    "at-chance": at_chance,
    "constant-prediction": constant_prediction,
    "same-answers": same_answers,
    "modes-coincide": modes_coincide,
    "answers-cut": answers_cut,
    "few-examples": few_examples,
    "few-steps": few_steps,
    "dead-neurons": dead_neurons,
    "few-calibration-tokens": few_calibration_tokens,
    "missing": missing,
    "pruning-gone": pruning_gone,
    "hardware": hardware,
    "budgets": budgets,
    "uncommitted": uncommitted,
    "unchecked": unchecked,
    "imported": imported,
}
