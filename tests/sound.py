"""Makers of ledgers in which the audit finds nothing, and of one error at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from factories import make_sweep

from tune_sparse.config import Cell, Protocol
from tune_sparse.config.protocol import SCORING
from tune_sparse.data.splits import Splits, fingerprint_splits, load_splits
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.evaluation.metrics import compute_metrics, with_earlier
from tune_sparse.evaluation.outcomes import Outcome, write_outcomes
from tune_sparse.files import read_json, write_json, write_lines
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.prunings import DESCRIPTION, FORMAT_VERSION, MASKS
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run, readable_id, write_config
from tune_sparse.schedules import ONE_SHOT

PROTOCOL = Protocol(
    steps=12,
    warmup_steps=0,
    global_batch_size=8,
    n_train=40,
    n_selection=8,
    n_test=400,
    eval_every=12,
)
METHODS = ("unstructured", "random")
MODES = ("sparse-to-dense", "sparse-to-sparse")
SEED = 19
"""With it the modes differ where a report tells them apart (tests/test_analysis.py)."""
SPARSITIES = (0.0, 0.3, 0.6)
MATRICES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")


@cache
def splits(protocol: Protocol, task: str = "boolq") -> Splits:
    return load_splits(TASKS[task], None, protocol)


def sound_run(cell: Cell, protocol: Protocol = PROTOCOL, **changes: Any) -> Run:
    fields = {
        "protocol": protocol,
        "model_path": "/models/tiny",
        "data_dir": None,
        "model_fingerprint": hashlib.sha256(cell.model.encode()).hexdigest(),
        "data_fingerprint": fingerprint_splits([splits(protocol, cell.task)]),
        "prompt_version": "1",
    }
    return Run(cell=cell, **fields | changes)


def make_cells(
    methods: Iterable[str] = METHODS, sparsities: Iterable[float] = SPARSITIES, **changes: Any
) -> list[Cell]:
    base = {"model": "tiny", "task": "boolq", "seed": 0, "backend": "torch"} | changes
    return [Cell(method=m, sparsity=s, mode=mode, **base) for m in methods for s in sparsities for mode in MODES]


def name_stream(run: Run, settings: Iterable[str] = tuple(vars(PROTOCOL))) -> str:
    """Names a run's random numbers by values alone: renaming a setting changes identities, and not these."""
    values = {name: getattr(run.protocol, name) for name in settings}
    changed = [str(value) for name, value in values.items() if value != getattr(PROTOCOL, name)]
    return "-".join([str(SEED), *map(str, asdict(run.cell).values()), run.model_fingerprint, *changed])


def make_outcomes(run: Run, accuracy: float, salt: str = "", answers: Mapping[str, str] | None = None) -> list[Outcome]:
    """Outcomes on the run's test examples, drawn by the run or `salt`: `answers`, or right with this probability."""
    rng, task = random.Random(salt or name_stream(run)), TASKS[run.cell.task]
    assert isinstance(task, PromptTask)
    found = []
    for example in splits(run.protocol, run.cell.task).test:
        name, gold = task.question_id(example), str(task.gold(example))
        right = rng.random() < accuracy
        predicted = answers[name] if answers else (gold if right else str(1 - int(gold)))
        likelihoods = (-rng.random(), -1 - rng.random())
        is_right = dict.fromkeys(task.metrics, predicted == gold)
        found.append(Outcome(task.name, name, gold, predicted, **is_right, log_likelihoods=likelihoods))
    return found


def write_sound(
    ledger: Ledger,
    run: Run,
    accuracy: float | None = None,
    answers: Mapping[str, str] | None = None,
    kept: Mapping[str, float] | None = None,
    **metrics: Any,
) -> Path:
    """A whole finished run. kept: the share of each matrix that its mask keeps; 1 - sparsity if not given."""
    cell, name = run.cell, name_stream(run)
    outcomes = make_outcomes(run, 0.95 - 0.3 * cell.sparsity if accuracy is None else accuracy, answers=answers)
    seed = cell.seed if cell.method == "random" else None
    untuned = replace(run, cell=replace(cell, mode=MODES[0], schedule=ONE_SHOT, seed=seed or 0))
    pruned_baseline = make_outcomes(run, 0.8 - 0.3 * cell.sparsity, f"untuned-{name_stream(untuned, SCORING)}")
    shares, task = kept or dict.fromkeys(MATRICES, 1 - cell.sparsity), TASKS[cell.task]
    kept_by_matrix = {matrix: [round(1000 * share), 1000] for matrix, share in shares.items()}
    counted = 1 - sum(k for k, _ in kept_by_matrix.values()) / (1000 * len(kept_by_matrix))
    changed = () if cell.schedule == ONE_SHOT else (cell.schedule, cell.seed)
    mask = hashlib.sha256(" ".join(map(str, (cell.method, cell.sparsity, seed, *changed))).encode()).hexdigest()
    losses = [hashlib.sha256(f"{name}{step}".encode()).digest()[0] / 256 + 0.01 for step in range(run.protocol.steps)]
    recorded = {
        **with_earlier(compute_metrics(task, outcomes), compute_metrics(task, pruned_baseline), None),
        "actual_sparsity": counted,
        "mask_sha256": mask,
        "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "train_loss": losses[-1],
        "eval_loss": 0.5,
        "eval_loss_before_mask": None,
        "inference_flops": {"2048": 2_000},
    }
    if cell.mode == "sparse-to-dense":
        recorded["update_removed_fraction"] = 0.25
    measured = {"trial_seconds": 3.0, "train_seconds": 2.0, "train_examples_per_second": 128.0}
    measured |= {"peak_memory_bytes": 2**20, "train_tokens_per_second": 4096.0}
    environment = {"hardware": "abacus", "host": "here", "packages": {"torch": "2.13"}, "git_sha": "c" * 40}
    record = Record(run.run_id, run.identity, "done", recorded | metrics, measured, environment)
    if not (ledger.folder / "pruned_baselines" / f"{run.pruned_baseline_id}.json").exists():
        ledger.write_pruned_baseline(run.pruned_baseline_id, {"metrics": {}, "run_id": run.run_id}, pruned_baseline)
    _write_pruning(ledger, run, mask)
    with ledger.writing(run.run_id) as folder:
        write_config(folder, run)
        described = {"mask_sha256": mask, "actual_sparsity": counted}
        write_json(folder / "sparse_config.json", described | {"kept_by_matrix": kept_by_matrix})
        zeros = {matrix: [of - k, of] for matrix, (k, of) in kept_by_matrix.items()}
        report = {"all_valid": True, "violations": [], "max_abs_at_masked": 0.0, "zeros_by_matrix": zeros}
        write_json(folder / "validation_report.json", report | described)
        write_lines(folder / "metrics.jsonl", [{"step": i, "train_loss": loss} for i, loss in enumerate(losses, 1)])
        write_outcomes(folder / "examples.parquet", outcomes)
        write_json(folder / "result.json", asdict(record))
    return ledger.run_folder(run.run_id)


def _write_pruning(ledger: Ledger, run: Run, mask: str) -> None:
    """The stored pruning of a run, where its method has one; the content of its file is none."""
    if run.pruning_id is None:
        return
    folder, content = ledger.pruning_folder(run.pruning_id), mask.encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MASKS).write_bytes(content)
    described = {"format_version": FORMAT_VERSION, "settings": run.pruning_settings, "mask_sha256": mask}
    sizes, checksums = {MASKS: len(content)}, {MASKS: hashlib.sha256(content).hexdigest()}
    write_json(
        folder / DESCRIPTION, described | {"bytes_by_file": sizes, "sha256_by_file": checksums, "provenance": {}}
    )


def sound_ledger(
    folder: Path,
    cells: Iterable[Cell] | None = None,
    protocol: Protocol = PROTOCOL,
    accuracy: Callable[[Cell], float | None] = lambda cell: None,
    started: float = 1_000.0,
) -> Ledger:
    """A sweep of `cells`, all runs finished, in a folder that may hold other sweeps; `accuracy` as in `write_sound`."""
    ledger, requested = Ledger(folder), list(cells or make_cells())
    runs = {cell: sound_run(cell.trained, protocol) for cell in requested}
    names = {cell: readable_id(cell, sound_run(cell, protocol).identity) for cell in requested}
    sweep = make_sweep(requested, started)
    owners: dict[str, str] = {}
    rows = []
    for cell, row in zip(requested, sweep.cells, strict=True):
        owner = owners.setdefault(runs[cell].run_id, names[cell])
        shared = None if owner == names[cell] else owner
        ids = {"cell_id": names[cell], "run_id": runs[cell].run_id, "pruning_id": runs[cell].pruning_id}
        rows.append(row | ids | {"shared_with": shared})
    ledger.write_sweep(replace(sweep, cells=tuple(rows)))
    for run in {run.run_id: run for run in runs.values()}.values():
        write_sound(ledger, run, accuracy(run.cell))
    return ledger


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file; a mapping is changed within."""
    content = read_json(path)
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    write_json(path, content)
