"""Checks for what makes results untrustworthy: each yields (what was found, the runs it is about)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from analysis.read.results import Predictions, Results, RunFiles, is_measured_elsewhere
from tune_sparse.config import BACKENDS, Cell
from tune_sparse.config.protocol import CALIBRATION_SETTINGS
from tune_sparse.data.splits import load_splits, split_path
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import InputError
from tune_sparse.identity import hash_json
from tune_sparse.ledger.prunings import StoredPruning
from tune_sparse.ledger.run import Run
from tune_sparse.models.architectures import matrix_named
from tune_sparse.modes import MODES, SPARSE_ADAPTER_MODES
from tune_sparse.pruning.methods import METHODS, TOLERANCE
from tune_sparse.schedules import SCHEDULES

T = TypeVar("T")
Detections = Iterator[tuple[str, list[str]]]

TEST_EXAMPLES = ("n_test", "num_fewshot")
HARMLESS = {
    *(*TEST_EXAMPLES, "max_new_tokens", "eval_every"),
    *("threads", "masked_lora_impl"),
}
"""Settings that may leave every bit of a training as it is."""
HASHED_BYTES = 256 * 2**20
"""A stored pruning of at most so many bytes is read by every audit."""
COUNTS_AGREE = 1e-6
"""Sparsities counted in masks and in weights; scores and the metrics made of them."""


def unreadable(results: Results) -> Detections:
    for file in results.unreadable:
        yield f"{file.path}: {file.reason}", [file.path.name]
    for e in results.run_files:
        if e.run.cell.backend not in BACKENDS:
            yield f"{e.folder}: the backend {e.run.cell.backend!r} is none of {', '.join(BACKENDS)}", [e.run_id]


def identity(results: Results) -> Detections:
    names = {(e.folder.parent, e.run_id) for e in results.run_files}
    for e in results.run_files:
        if e.run.identity != e.record.identity:
            yield (
                f"{e.run_id}: config.yaml has the identity {e.run.identity[:12]}, the record {e.record.identity[:12]}: "
                "its settings were changed, or another version of this program made it",
                [e.run_id],
            )
        elif e.run_id != e.run.run_id and (e.folder.parent, e.run.run_id) not in names:
            yield f"{e.run_id}: its settings and record are those of {e.run.run_id}", [e.run_id]


def checksum(results: Results) -> Detections:
    for e in results.done:
        places = {"result.json": e.record.metrics, "sparse_config.json": e.sparse_config}
        places |= {"validation_report.json": e.validation, "the adapter": e.marker or {}}
        found = {name: str(place["mask_sha256"])[:12] for name, place in places.items() if place.get("mask_sha256")}
        if len(set(found.values())) > 1:
            yield f"{e.run_id}: the mask has several checksums: {_listed(found)}", [e.run_id]


def pruning(results: Results) -> Detections:
    """Large files are not hashed here: whoever reads them does that."""
    users = grouped(results.done, lambda e: e.pruning_folder)
    for stored in results.prunings:
        runs = users.get(stored.folder, [])
        try:
            if stored.bytes <= HASHED_BYTES:
                stored.verify()
        except InputError as error:
            yield str(error), [e.run_id for e in runs] or [stored.folder.name]
        for e in runs:
            trained = e.record.metrics["mask_sha256"]
            if trained != stored.mask_sha256:
                yield (
                    f"{e.run_id}: it was trained on the mask {trained[:12]}, {stored.folder} has "
                    f"{stored.mask_sha256[:12]}",
                    [e.run_id],
                )


def duplicate_results(results: Results) -> Detections:
    for first, second, alike in alike_runs(results):
        if differing(first.run, second.run) and not modes_coincide(first, second):
            names = ", ".join(differing(first.run, second.run))
            yield (
                f"{first.run_id} and {second.run_id} differ in {names}, and to the last bit not in {alike}",
                [first.run_id, second.run_id],
            )


def measured_elsewhere(results: Results) -> Detections:
    for value in results.throughputs:
        if is_measured_elsewhere(value):
            yield (
                f"throughput/{value['run_id']}.json has rates of a run of Cerebras that torch measured here, by an "
                "earlier version of this program: remove it, and measure again",
                [value["run_id"]],
            )


def alike_runs(results: Results) -> Iterator[tuple[RunFiles, RunFiles, str]]:
    """Pairs of runs that have a loss series, scores or weights in common, each pair once, with what it is."""
    proofs: dict[str, Callable[[RunFiles], Hashable]] = {
        "their loss series": lambda e: e.losses or None,
        "their scores": lambda e: e.predictions.likelihoods_sha256 if e.predictions else None,
        "their weights": lambda e: e.record.metrics.get("weights_sha256"),
    }
    pairs: dict[tuple[str, str], tuple[RunFiles, RunFiles, list[str]]] = {}
    for name, proof in proofs.items():
        for same in grouped(results.done, proof).values():
            for pair in pairwise(same):
                key = (pair[0].run_id, pair[1].run_id)
                pairs.setdefault(key, (*pair, []))[2].append(name)
    for first, second, names in pairs.values():
        if first.record.identity != second.record.identity:
            yield first, second, ", ".join(names)


def modes_coincide(first: RunFiles, second: RunFiles) -> bool:
    """Whether both LoRA modes are one and the same training: where only whole feed-forward channels are gone, the
    gradients of what their adapters add there are 0 from the first step on."""
    method = METHODS.get(first.run.cell.method)
    return (
        differing(first.run, second.run) == ["mode"]
        and {first.run.cell.mode, second.run.cell.mode} == set(SPARSE_ADAPTER_MODES)
        and method is not None
        and method.pattern == "structured"
        and first.sparse_config["mask_sha256"] == second.sparse_config["mask_sha256"]
        and all(kept == of for name, (kept, of) in first.sparse_config["kept_by_matrix"].items() if _is_attention(name))
    )


def _is_attention(name: str) -> bool:
    matrix = matrix_named(name)
    return matrix is not None and matrix.is_attention


def no_effect(results: Results) -> Detections:
    masks = grouped(results.done, lambda e: (e.run.model_fingerprint, e.record.metrics["mask_sha256"]))
    for same in masks.values():
        requested = grouped(same, lambda e: _requested_mask(e.run.cell))
        if len(requested) > 1:
            names = " and ".join(runs[0].run_id for runs in requested.values())
            yield f"{names} have one and the same mask", [e.run_id for e in same]
    dense = {_scored(e.run): e.pruned_baseline for e in results.done if e.run.cell.sparsity == 0}
    for e in results.done:
        cell = e.run.cell
        if MODES[cell.mode].masks_at_merge and e.record.metrics.get("update_removed_fraction") == 0:
            yield f"{e.run_id}: the last mask removed nothing of the trained update", [e.run_id]
        if _same_scores(e.pruned_baseline, e.predictions):
            yield f"{e.run_id}: every score is the one before tuning, to the last bit", [e.run_id]
        starts_pruned = cell.sparsity and not SCHEDULES[cell.schedule].starts_dense
        if starts_pruned and _same_scores(e.pruned_baseline, dense.get(_scored(e.run))):
            yield f"{e.run_id}: before tuning every score is the unpruned model's, to the last bit", [e.run_id]


def off_target(results: Results) -> Detections:
    for e in results.done:
        kept = list(e.sparse_config["kept_by_matrix"].values())
        recounted = 1 - sum(k for k, _ in kept) / sum(of for _, of in kept)
        found = {"in the masks": recounted, "in sparse_config.json": e.sparse_config["actual_sparsity"]}
        found |= {"in the deployed weights": e.validation["actual_sparsity"]}
        found |= {"in result.json": e.record.metrics["actual_sparsity"]}
        target = e.run.cell.sparsity
        if any(abs(value - target) > TOLERANCE for value in found.values()):
            yield f"{e.run_id}: the target sparsity is {target:g}, within {TOLERANCE:g}; {_listed(found)}", [e.run_id]
        elif abs(recounted - e.sparse_config["actual_sparsity"]) > COUNTS_AGREE:
            yield f"{e.run_id}: the counts disagree: {_listed(found)}", [e.run_id]


def zeros_lost(results: Results) -> Detections:
    for e in results.done:
        if not e.validation["all_valid"] or e.validation["max_abs_at_masked"]:
            broken = (
                "; ".join(e.validation["violations"]) or f"max {e.validation['max_abs_at_masked']:g} at masked weights"
            )
            yield f"{e.run_id}: its validation found: {broken}", [e.run_id]
        for name, (zeros, of) in e.validation["zeros_by_matrix"].items():
            masked = of - e.sparse_config["kept_by_matrix"][name][0]
            if zeros < masked:
                yield f"{e.run_id}: {name} has {zeros} zeros, its mask has {masked}", [e.run_id]


def mixed_versions(results: Results) -> Detections:
    """Runs of one model, task and protocol are compared with each other; code and packages, within a backend."""
    for (model, task, _), runs in compared(results).items():
        for name in ("data_fingerprint", "prompt_version", "model_fingerprint"):
            yield from _several(f"{model}, {task}: {name}", runs, partial(_input, name))
        for backend, same in grouped(runs, lambda e: e.run.cell.backend).items():
            where = f"{model}, {task} on {backend}"
            yield from _several(f"{where}: the commit", same, lambda e: e.record.environment.get("git_sha"))
            for name in sorted({name for e in same for name in e.record.environment.get("packages", {})}):
                yield from _several(f"{where}: the version of {name}", same, partial(_version, name))


def _input(name: str, e: RunFiles) -> Any:
    return getattr(e.run, name)


def _version(package: str, e: RunFiles) -> Any:
    return e.record.environment.get("packages", {}).get(package)


def overlap(results: Results) -> Detections:
    """Examples are read again where they still are; where they are not, `unchecked` says so."""
    for runs in grouped(results.done, examples_key).values():
        run, names = runs[0].run, [e.run_id for e in runs]
        trained: set[str] = set()
        try:
            trained = {name for task, example in _training_examples(run) for name in [task.question_id(example)]}
        except InputError as error:
            if has_examples(run):
                yield f"{run.cell.task}: {error}", names
        for e in runs:
            shared = trained & set(e.predictions.ids) if e.predictions else set()
            if shared:
                yield f"{e.run_id}: {len(shared)} scored questions were trained on, {min(shared)} is one", [e.run_id]


def examples_key(e: RunFiles) -> tuple[Any, ...]:
    p = e.run.protocol
    limits = (p.n_train, p.n_selection, p.n_test, p.num_fewshot)
    return (e.run.cell.task, e.run.data_dir, e.run.data_fingerprint, *limits)


def has_examples(run: Run) -> bool:
    """Whether the examples of a run are on this machine."""
    if run.data_dir is None:
        return True
    return all(split_path(task, "train", Path(run.data_dir)).exists() for task in tasks_named(run.cell.task))


def _training_examples(run: Run) -> Iterator[tuple[PromptTask, Any]]:
    for task in tasks_named(run.cell.task):
        splits = load_splits(task, Path(run.data_dir) if run.data_dir else None, run.protocol)
        if isinstance(task, PromptTask):
            yield from ((task, example) for example in splits.train)


def counted_twice(results: Results) -> Detections:
    for sweep in results.sweeps:
        for run_id, cells in grouped_cells(sweep.cells, "run_id").items():
            owners = [cell["cell_id"] for cell in cells if cell["shared_with"] is None]
            if len(owners) > 1:
                yield f"{run_id} is counted as the own run of {' and '.join(owners)}", [run_id]
    for same in grouped(results.run_files, lambda e: (e.folder.parent, e.record.identity)).values():
        if len(same) > 1:
            yield f"one record lies in {' and '.join(e.run_id for e in same)}", [e.run_id for e in same]


def unproven_number(results: Results) -> Detections:
    """Numbers that no run of theirs stands behind."""
    for cell_id, cell in results.cells.items():
        served_by = results.by_run.get(cell["run_id"])
        requested = Cell(**{name: cell[name] for name in Cell.__dataclass_fields__})
        if served_by and served_by.run.cell != requested.trained:
            yield f"{cell_id} points to {cell['run_id']}, which is a run of another cell", [cell["run_id"]]
    for e in results.done:
        for text in _unproved(e):
            yield f"{e.run_id}: {text}", [e.run_id]


def _unproved(e: RunFiles) -> Iterator[str]:
    metrics, steps = e.record.metrics, e.run.own_steps
    if len(e.losses) != steps:
        yield f"{steps} steps were requested, metrics.jsonl has the losses of {len(e.losses)}"
    elif e.losses[-1] != metrics["train_loss"]:
        yield f"the recorded train_loss is {metrics['train_loss']!r}, the last step's {e.losses[-1]!r}"
    if e.predictions is None or "accuracy" not in metrics:
        return
    for name, predictions in {"accuracy": e.predictions, "accuracy_before_tuning": e.pruned_baseline}.items():
        if predictions is not None and abs(predictions.mean() - metrics[name]) > COUNTS_AGREE:
            yield f"the recorded {name} is {metrics[name]!r}, its outcomes say {predictions.mean():.6g}"
    if len(e.predictions.ids) != metrics["n_examples"]:
        yield f"{metrics['n_examples']} examples are recorded, {len(e.predictions.ids)} have an outcome"


def conflict(results: Results) -> Detections:
    for run_id, same in grouped([e for e in results.run_files if e.is_done], lambda e: e.run_id).items():
        first = same[0]
        for other in same[1:]:
            names = sorted(set(first.record.metrics) & set(other.record.metrics))
            names = [name for name in names if first.record.metrics[name] != other.record.metrics[name]]
            if names:
                values = ", ".join(
                    f"{n} {_short(first.record.metrics[n])}, {_short(other.record.metrics[n])}" for n in names
                )
                places = f"{first.folder.parents[1]} (which counts) and {other.folder.parents[1]}"
                yield f"{run_id} differs between {places}: {values}", [run_id]
    yield from _conflicting_prunings(results)


def _conflicting_prunings(results: Results) -> Detections:
    """Prunings of one identity that several folders made: runs that were trained on them are not of one mask."""
    by_id: dict[str, list[StoredPruning]] = defaultdict(list)
    for stored in results.prunings:
        by_id[hash_json(stored.settings)].append(stored)
    for first, *others in by_id.values():
        for other in others:
            if first.sha256_by_file != other.sha256_by_file:
                users = [e.run_id for e in results.done if e.pruning_folder in (first.folder, other.folder)]
                yield f"{first.folder} and {other.folder} hold different prunings", users or [first.folder.name]


def compared(results: Results) -> dict[Any, list[RunFiles]]:
    """{(model, task, protocol): done runs}"""
    return grouped(results.done, lambda e: (e.run.cell.model, e.run.cell.task, e.run.protocol))


def grouped(runs: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Group runs by a key; those with the key None are left out."""
    found = defaultdict(list)
    for e in runs:
        found[key(e)].append(e)
    found.pop(None, None)
    return dict(found)


def grouped_cells(cells: Iterable[dict[str, Any]], name: str) -> dict[Any, list[dict[str, Any]]]:
    found = defaultdict(list)
    for cell in cells:
        found[cell[name]].append(cell)
    return dict(found)


def differing(first: Run, second: Run) -> list[str]:
    """Names of the settings that two runs differ in, besides those that may leave every bit as it is."""
    left, right = _settings(first), _settings(second)
    harmless = set(HARMLESS)
    if not (first.is_calibrated or second.is_calibrated):
        harmless |= set(CALIBRATION_SETTINGS)
    if not (first.is_recovered or second.is_recovered):
        harmless |= {"recover"}
    names = [name for name in left if left[name] != right[name]]
    if any(name in TEST_EXAMPLES for name in names):  # the fingerprint is of test examples too
        harmless |= {"data_fingerprint"}
    return [name for name in names if name not in harmless]


def _settings(run: Run) -> dict[str, Any]:
    inputs = {name: getattr(run, name) for name in ("model_fingerprint", "data_fingerprint", "prompt_version")}
    schedule = SCHEDULES[run.cell.schedule].read(run.schedule_settings)
    return asdict(run.cell) | asdict(run.protocol) | inputs | {"schedule_settings": schedule}


def _requested_mask(cell: Cell) -> tuple[Any, ...]:
    """The settings that must have a mask of their own."""
    is_seeded = cell.method in METHODS and METHODS[cell.method].needs.seed
    changes = cell.schedule if SCHEDULES[cell.schedule].planner else None
    return (cell.method, cell.sparsity, cell.seed if is_seeded else None, changes)


def _scored(run: Run) -> tuple[Any, ...]:
    """The settings that have one unpruned accuracy before tuning."""
    p = run.protocol
    limits = (p.precision, p.max_tokens, p.num_fewshot, p.threads)
    return (run.model_fingerprint, run.data_fingerprint, run.prompt_version, run.cell.task, *limits)


def _same_scores(first: Predictions | None, second: Predictions | None) -> bool:
    if first is None or second is None or first.likelihoods_sha256 is None:
        return False
    return first.likelihoods_sha256 == second.likelihoods_sha256


def _several(what: str, runs: list[RunFiles], value: Callable[[RunFiles], Any]) -> Detections:
    by_value = grouped(runs, lambda e: str(value(e)))
    if len(by_value) > 1:
        found = {f"{v[:12]}": f"{len(same)} runs" for v, same in by_value.items()}
        fewest = min(by_value.values(), key=len)
        yield f"{what} differs: {_listed(found)}", [e.run_id for e in fewest]


def _listed(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in found.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:40]
