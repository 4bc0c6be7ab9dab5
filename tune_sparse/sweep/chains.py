"""Chains of a sweep: runs that begin where another one ended, and wait until it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise, product

from tune_sparse.config import SweepConfig
from tune_sparse.config.options import rule
from tune_sparse.errors import InputError
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.masks import structured_counts
from tune_sparse.pruning.methods import method_named
from tune_sparse.schedules import SCHEDULES, Level
from tune_sparse.sweep.points import CellAtPoint


def levels_of(point: CellAtPoint) -> list[Level]:
    """The levels of the chain that ends with a cell, each with the steps of its own training; none without levels."""
    schedule = SCHEDULES[point.cell.schedule]
    return schedule.levels(point.schedule_settings, point.cell.sparsity, point.protocol.steps)


def chains_of(config: SweepConfig) -> list[list[Level]]:
    """The distinct chains of a sweep, by the sparsities of its cells and the points of its axes."""
    found = (
        tuple(SCHEDULES[name].levels(config.schedule_settings_at(point), sparsity, config.protocol_at(point).steps))
        for name, sparsity, point in product(config.schedules, config.sparsities, config.points)
    )
    return [list(levels) for levels in dict.fromkeys(found) if levels]


def chain_lines(chains: Iterable[Sequence[Level]]) -> list[str]:
    """For people, a line for each chain; none where there is none."""
    lines = [
        f"  to {levels[-1].sparsity:g}: sparsities {' '.join(f'{level.sparsity:g}' for level in levels)}, tuned for "
        f"{' '.join(f'{level.steps}' for level in levels)} steps"
        for levels in chains
    ]
    return ["Levels, each a run that begins from the one before:", *lines] if lines else []


def chain_points(point: CellAtPoint) -> list[CellAtPoint]:
    """The trainings that lead to a cell, each with its own steps; the cell alone without levels."""
    levels = levels_of(point)
    return [
        replace(
            point,
            cell=replace(point.cell, sparsity=last.sparsity),
            protocol=replace(point.protocol, steps=last.steps),
            schedule_settings=replace(
                point.schedule_settings, levels=tuple(level.sparsity for level in levels[:count]), steps_per_level=None
            ),
        )
        for count, last in enumerate(levels, start=1)
    ] or [point]


def last_of_chain(run: Run, levels: list[Level]) -> Run:
    """A run with the levels of the chain that it ends, and the steps of all of them. Without levels it stays."""
    if not levels:
        return run
    settings, steps = run.schedule_settings, sum(level.steps for level in levels)
    up_to = tuple(level.sparsity for level in levels)
    return replace(
        run,
        protocol=replace(run.protocol, steps=steps),
        schedule_settings=replace(settings, levels=up_to, steps_per_level=None),
        chain_steps=None if settings.restart_learning_rate else steps,
    )


def chain(run: Run) -> list[Run]:
    """The runs that lead to one, in their order, and the run itself."""
    before = run.level_before
    return [*chain(before), run] if before else [run]


def check_chains(config: SweepConfig) -> None:
    """Raise `InputError` for levels that cannot be trained, or pruned further as asked, at some point of the axes."""
    for point in config.points:
        _check_chains(config.at(point))


def _check_chains(config: SweepConfig) -> None:
    chains = chains_of(config)
    if not chains:
        return
    rule(config.protocol.recover == "none", "levels are not recovered", config.protocol.recover, "Set recover=none.")
    for method in config.methods if not config.schedule_settings.rescore else ():
        rule(
            not method_named(method).updates_weights,
            "rescore=false takes the masks of the dense model, whose weights a method must not update",
            method,
            "Leave it out, or set rescore=true.",
        )
    for levels in chains:
        rule(
            all(level.steps for level in levels),
            f"each of {len(levels)} levels up to {levels[-1].sparsity:g} must be trained at least one step",
            config.protocol.steps,
            "Raise steps, or give fewer levels.",
        )
        replace(config.protocol, steps=min(level.steps for level in levels))  # has room for the warm-up


def check_nested(method: str, dims: ModelDims, levels: list[Level]) -> None:
    """Raise `InputError` where structured pruning would have to give back groups or channels on the way."""
    if method_named(method).pattern != "structured":
        return
    counts = [structured_counts(dims, level.sparsity) for level in levels]
    for (before, after), level in zip(pairwise(counts), levels[1:], strict=True):
        if after[0] < before[0] or after[1] < before[1]:
            raise InputError(
                f"what a level prunes must stay pruned: {method} takes (groups, channels) {before} from a block, and "
                f"{after} for {level.sparsity:g}. Choose other levels, or an element-wise method."
            )


class Chains:
    """Says which runs of a sweep may begin: those whose level before is done, and those without one."""

    def __init__(self, ledger: LedgerReader, runs: Iterable[Run]) -> None:
        before = {run.run_id: own for run in runs if (own := run.level_before)}
        self._waits = {run_id: own.run_id for run_id, own in before.items() if not ledger.is_done(own.run_id)}

    def is_ready(self, run: Run) -> bool:
        return run.run_id not in self._waits

    def ended(self, record: Record) -> None:
        """Let those begin that waited for a run, if it is done."""
        if record.status == "done":
            self._waits = {run_id: before for run_id, before in self._waits.items() if before != record.run_id}

    def lines(self) -> list[str]:
        """Say which runs were left, and why."""
        return [f"left: {run_id}: its level before, {before}, is not done" for run_id, before in self._waits.items()]
