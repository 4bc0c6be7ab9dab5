"""Checks for what a reader must know: each yields (what was found, the runs it is about)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from analysis.audit.errors import Detections, compared, examples_key, grouped, has_examples, modes_coincide
from analysis.read.results import Results, RunFiles
from analysis.stats.statistics import smallest_shown
from tune_sparse.config.budgets import TOKEN_BUDGETS
from tune_sparse.pruning.methods import ENOUGH_TOKENS_PER_INPUT, METHODS

ALMOST_ALWAYS = 0.95
"""A share of all predictions that one answer has."""
SMALLEST_CLAIM = 0.05
"""The difference that reports claim or deny most often, and that examples must therefore be able to show."""
MANY_CUT = 0.05
"""A share of all answers that the limit ended: more may be what keeps a model from a right answer."""
MANY_DEAD = 0.5
"""A share of outputs, or inputs, of which no weight is left: the model is a narrower one."""
FEW_STEPS = 10
"""A rate of fewer timed steps is of the warm-up as much as of the work."""


def at_chance(results: Results) -> Detections:
    for (model, task, _), runs in compared(results).items():
        low = [e for e in runs if "accuracy" in e.record.metrics and e.record.metrics["accuracy"] <= _level(e)]
        if low:
            values = [e.record.metrics["accuracy"] for e in low]
            yield (
                f"{model}, {task}: {len(low)} runs are at or below chance or the largest class ({_level(low[0]):.3f}): "
                f"accuracy {min(values):.3f} to {max(values):.3f}",
                _ids(low),
            )


def _level(e: RunFiles) -> float:
    metrics = e.record.metrics
    return max(metrics.get("chance_accuracy") or 0.0, metrics.get("majority_fraction") or 0.0)


def constant_prediction(results: Results) -> Detections:
    for (model, task, _), runs in compared(results).items():
        same = [e for e in runs if (e.record.metrics.get("most_frequent_fraction") or 0) >= ALMOST_ALWAYS]
        if same:
            yield (
                f"{model}, {task}: {len(same)} runs give one answer to {ALMOST_ALWAYS:.0%} of the examples",
                _ids(same),
            )


def same_answers(results: Results) -> Detections:
    for (model, task, _), runs in compared(results).items():
        judged = [e for e in runs if "accuracy" in e.record.metrics]
        answered = [e for e in judged if e.predictions is not None and e.predictions.scores.any()]
        alike = grouped(answered, lambda e: e.predictions.predictions_sha256 if e.predictions else None)
        for same in alike.values():
            if len({e.record.identity for e in same}) > 1:
                accuracy = same[0].record.metrics["accuracy"]
                yield (
                    f"{model}, {task}: {len(same)} runs predict the same everywhere (accuracy {accuracy:.3f})",
                    _ids(same),
                )


def modes_alike(results: Results) -> Detections:
    for same in grouped(results.done, lambda e: e.record.metrics.get("mask_sha256")).values():
        for first, second in combinations(same, 2):
            if modes_coincide(first, second):
                yield (
                    f"{first.run_id} and {second.run_id} are one training but for rounding: at this sparsity only "
                    "whole feed-forward channels are gone",
                    [first.run_id, second.run_id],
                )


def few_examples(results: Results) -> Detections:
    for (model, task, _), runs in compared(results).items():
        counts = [e.record.metrics["n_examples"] for e in runs if "accuracy" in e.record.metrics]
        if counts and smallest_shown(min(counts)) > SMALLEST_CLAIM:
            yield (
                f"{model}, {task}: {min(counts)} examples show differences from about "
                f"{smallest_shown(min(counts)):.3f} on between two runs; a smaller one cannot be claimed",
                _ids(runs),
            )


def answers_cut(results: Results) -> Detections:
    for (model, task, protocol), runs in compared(results).items():
        cut = [e for e in runs if (e.record.metrics.get("cut_fraction") or 0.0) > MANY_CUT]
        if cut:
            shares = [e.record.metrics["cut_fraction"] for e in cut]
            yield (
                f"{model}, {task}: {len(cut)} runs had {min(shares):.0%} to {max(shares):.0%} of their answers cut at "
                f"max_new_tokens={protocol.max_new_tokens}, before the model ended them. Raise it, unless these models "
                "write without end",
                _ids(cut),
            )


def few_steps(results: Results) -> Detections:
    short = [e for e in results.done if e.run.own_steps < FEW_STEPS]
    if short:
        yield f"{len(short)} runs have a throughput of fewer than {FEW_STEPS} steps", _ids(short)


def dead_neurons(results: Results) -> Detections:
    """Of runs that record their masks, which those do that train the masked weights themselves."""
    dead = {e.run_id: share for e in results.done if (share := _dead_share(e)) > MANY_DEAD}
    if dead:
        worst = max(dead.values())
        yield f"{len(dead)} runs ended with up to {worst:.0%} of the outputs or inputs of matrices dead", list(dead)


def _dead_share(e: RunFiles) -> float:
    ended = e.record.metrics.get("dynamics", {})
    return max((share for name, share in ended.items() if name.startswith("dead_neurons/")), default=0.0)


def few_calibration_tokens(results: Results) -> Detections:
    """Of SparseGPT: no other score inverts what it measures."""
    for (model, task, _), runs in compared(results).items():
        few = [e for e in runs if _lacks_calibration_tokens(e)]
        if few:
            least = min(few, key=_tokens_per_input)
            yield (
                f"{model}, {task}: {len(few)} runs of sparsegpt were calibrated on too little, {least.run_id} on "
                f"{least.record.metrics['calibration_tokens_seen']} tokens, {_tokens_per_input(least):.2g} for each "
                "input of the widest layer",
                _ids(few),
            )


def _lacks_calibration_tokens(e: RunFiles) -> bool:
    method = METHODS.get(e.run.cell.method)
    return method is not None and method.updates_weights and _tokens_per_input(e) < ENOUGH_TOKENS_PER_INPUT


def _tokens_per_input(e: RunFiles) -> float:
    return float(e.record.metrics.get("calibration_tokens_per_input", math.inf))


def missing(results: Results) -> Detections:
    states = {e.run_id: e for e in results.run_files if not e.is_done}
    lost = [cell for cell in results.cells.values() if cell["run_id"] not in results.by_run]
    stopped = [cell["run_id"] for cell in lost if cell["run_id"] in states and states[cell["run_id"]].record.stopped]
    if stopped:
        yield f"{len(stopped)} cells were stopped early, by the sweep's stop_early: they have no result", stopped
    for cell in lost:
        state = states.get(cell["run_id"])
        if state and state.record.stopped:
            continue
        why = state.record.status if state else "missing"
        error = (
            f": {state.record.error['class']}: {state.record.error['message']}" if state and state.record.error else ""
        )
        yield f"{cell['cell_id']} is {why}{error}", [cell["run_id"]]


def pruning_gone(results: Results) -> Detections:
    for folder, runs in grouped(results.done, lambda e: e.pruning_folder).items():
        if not folder.exists():
            yield (
                f"{len(runs)} runs were trained on a pruning that is gone, {folder}: they cannot be merged, evaluated "
                "or repeated any more",
                _ids(runs),
            )


def hardware(results: Results) -> Detections:
    for (model, task, _), runs in compared(results).items():
        by_name = grouped(runs, lambda e: (e.run.cell.backend, str(e.record.environment.get("hardware"))))
        if len({name for _, name in by_name}) > len({backend for backend, _ in by_name}):
            kinds = ", ".join(f"{name}: {len(same)}" for (_, name), same in by_name.items())
            unlike = unlike_pairs(runs, lambda e: e.record.environment.get("hardware"))
            yield (
                f"{model}, {task} ran on several kinds of hardware ({kinds}), {len(unlike)} pairs that are compared on "
                "different ones",
                _ids(min(by_name.values(), key=len)),
            )


def budgets(results: Results) -> Detections:
    for (model, task, _), runs in compared(results).items():
        unlike = unlike_pairs(runs, _tokens_at_once)
        if unlike:
            first, second = unlike[0]
            yield (
                f"{model}, {task}: {len(unlike)} pairs that are compared ran under different budgets, "
                f"{first.run_id} and {second.run_id} among them",
                sorted({e.run_id for pair in unlike for e in pair}),
            )


def _tokens_at_once(e: RunFiles) -> tuple[int, ...] | None:
    """Activations that are computed again, and effective weights that are kept, have the same bits."""
    budgets = e.record.measured.get("budgets")
    return budgets and tuple(budgets[name] for name in TOKEN_BUDGETS)


def unlike_pairs(runs: Sequence[RunFiles], value: Callable[[RunFiles], Any]) -> list[tuple[RunFiles, RunFiles]]:
    """Pairs that a paired comparison takes, and whose recorded values differ: two modes, or two schedules, of one
    method, sparsity, seed and backend, and a cell with its dense baseline. Two settings of one cell are no pair."""
    alike = grouped(runs, lambda e: (*_series(e), e.run.cell.method, e.run.cell.sparsity)).values()
    pairs = [pair for same in alike for pair in combinations(same, 2) if _is_paired(*pair)]
    dense = {_series(e): e for e in runs if not e.run.cell.sparsity}
    pairs += [(dense[_series(e)], e) for e in runs if e.run.cell.sparsity and _series(e) in dense]
    values = [(pair, value(pair[0]), value(pair[1])) for pair in pairs]
    return [pair for pair, one, other in values if None not in (one, other) and one != other]


def _is_paired(first: RunFiles, second: RunFiles) -> bool:
    one, other = first.run.cell, second.run.cell
    return (one.mode != other.mode) != (one.schedule != other.schedule)


def _series(e: RunFiles) -> tuple[int, str]:
    return e.run.cell.seed, e.run.cell.backend


def uncommitted(results: Results) -> Detections:
    loose = [e for e in results.done if (e.record.environment.get("git_sha") or "-dirty").endswith("-dirty")]
    if loose:
        yield f"{len(loose)} runs were computed by code that is in no commit", _ids(loose)


def unchecked(results: Results) -> Detections:
    unsummed = [e for e in results.done if "weights_sha256" not in e.record.metrics]
    if unsummed:
        yield (
            f"{len(unsummed)} runs have no checksum of their deployed weights: they are of an earlier format",
            _ids(unsummed),
        )
    for runs in grouped(results.done, examples_key).values():
        if not has_examples(runs[0].run):
            where = runs[0].run.data_dir
            yield (
                f"the examples of {runs[0].run.cell.task} are no longer here ({where}): overlap was not checked again",
                _ids(runs),
            )


def imported(results: Results) -> Detections:
    for record in results.imported:
        yield (
            f"{record.model}, {record.task}: {record.accuracy:g} was imported from {record.source}",
            [record.record_id],
        )


def _ids(runs: list[RunFiles]) -> list[str]:
    return [e.run_id for e in runs]
