"""A finished run made once more from nothing, and compared with its record."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainables.hardware import environment
from trainables.pipeline import run_cell
from trainables.rebuild import stored_pruning
from trainables.worker import WorkerCache
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.evaluation.outcomes import Outcome, read_outcomes
from tune_sparse.ledger.contracts import LedgerReader, RunStore
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.training.budgets import Budgets

LOSS_TOLERANCE = 0.02
"""Relative, of a number that other hardware or other versions computed: sums are rounded otherwise, and training
carries that on."""


@dataclass(frozen=True)
class Comparison:
    """A run and its repetition: every metric that differs, as `name: recorded, repeated`."""

    is_exact: bool
    """The same bits were demanded: on a CPU of the same name, with the same versions."""
    differences: tuple[str, ...]
    examples: int
    answered_otherwise: int
    not_recorded: tuple[str, ...]
    """metrics that this version records and the earlier one did not"""


def rerun(run: Run, ledger: LedgerReader) -> Comparison:
    """Prune, train, merge and score `run` again in a scratch folder, and compare. The ledger is only read, and a stored
    pruning is read from it.

    Raises `InputError` where the run cannot be repeated here: other weights or examples, a stored pruning that is gone,
    or a training that fails.
    """
    recorded = ledger.record(run.run_id)
    assert recorded is not None
    with tempfile.TemporaryDirectory(prefix="tune-sparse-rerun-") as scratch:
        again = Ledger(Path(scratch))
        _lend(run, ledger, again)
        try:
            repeated = _finished(_as_recorded(run, recorded), again)
        except NotReadyError as error:
            raise InputError(f"{run.run_id} cannot be repeated here: {error}") from error
        if repeated.error:
            raise InputError(f"{run.run_id} cannot be repeated here: {repeated.error['message']}")
        before, after = (read_outcomes(place.run_folder(run.run_id) / "examples.parquet") for place in (ledger, again))
    return compared(recorded, repeated, before, after, same_bits(recorded.environment))


def _lend(run: Run, ledger: LedgerReader, again: Ledger) -> None:
    """Let the scratch folder have what `run` begins from: the stored pruning, and of a level the level before it."""
    before = run.level_before
    for own in (run, before) if before else (run,):
        if stored := stored_pruning(own, ledger):
            _link(again.pruning_folder(stored.folder.name), stored.folder)
    if before:
        _link(again.run_folder(before.run_id), ledger.run_folder(before.run_id))


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target.resolve())


def _as_recorded(run: Run, recorded: Record) -> Run:
    """The run with the budgets that it used."""
    return replace(run, budgets=Budgets.from_record(recorded.measured["budgets"]).as_options())


def _finished(run: Run, ledger: RunStore) -> Record:
    steps = run_cell(run, ledger, WorkerCache())
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def same_bits(recorded: Mapping[str, Any]) -> bool:
    """Whether this machine must give the bits that were recorded there."""
    here = environment()
    return not torch.cuda.is_available() and all(recorded.get(name) == here[name] for name in ("hardware", "packages"))


def compared(
    recorded: Record, repeated: Record, before: list[Outcome], after: list[Outcome], is_exact: bool
) -> Comparison:
    """Exactly: every bit of every metric and every outcome. Otherwise accuracies within one standard error and other
    numbers within `LOSS_TOLERANCE`; checksums and rounding losses are then not compared."""
    left, right = dict(_flat(recorded.metrics)), dict(_flat(repeated.metrics))
    stderr = recorded.metrics.get("accuracy_stderr") or 0.0
    differences = [
        f"{name}: {left[name]}, {right.get(name)}"
        for name in left
        if not (left[name] == right.get(name) or (not is_exact and _close(name, left[name], right.get(name), stderr)))
    ]
    left_by_id, right_by_id = ({(o.task, o.id): o for o in outcomes} for outcomes in (before, after))
    names = left_by_id.keys() | right_by_id.keys()
    otherwise = sum(left_by_id.get(name) != right_by_id.get(name) for name in names)
    if is_exact and otherwise:
        differences.append(f"outcomes: {otherwise} of {len(before)} examples")
    return Comparison(is_exact, tuple(differences), len(before), otherwise, tuple(right.keys() - left.keys()))


def _close(name: str, before: Any, after: Any, stderr: float) -> bool:
    if name.endswith("_sha256") or name == "update_rounded_away_fraction":
        return True
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        return False
    if any(part in name for part in ("acc", "exact_match", "f1", "most_frequent_fraction", "cut_fraction")):
        return abs(before - after) <= stderr
    return math.isclose(before, after, rel_tol=LOSS_TOLERANCE)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
