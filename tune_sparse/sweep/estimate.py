"""Memory and hours of a sweep by the formula: before data, checkpoint or card are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune_sparse.config import SweepConfig
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import NotReadyError, TooLargeError
from tune_sparse.evaluation.card_budgets import budgets_for, least_card_bytes
from tune_sparse.evaluation.cards import Card
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.evaluation.published import published_dims, published_sizes
from tune_sparse.evaluation.seconds import CellSeconds, TaskSizes
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import check_checkpoint, short_name
from tune_sparse.models.dims import ModelDims
from tune_sparse.sweep.examples import Examples
from tune_sparse.sweep.plan import Plan
from tune_sparse.sweep.points import CellAtPoint
from tune_sparse.sweep.progress import duration

Kind = tuple[str, str, str]
"""Model, mode and method."""
Training = tuple[CellMemory, TaskSizes]


@dataclass(frozen=True)
class Sizes:
    """The sizes of what a sweep names, as far as they are known."""

    dims: Mapping[str, ModelDims]
    """{short name of a model: its sizes}"""
    tasks: Mapping[str, TaskSizes]
    assumed: tuple[str, ...] = ()
    """Models and tasks whose sizes were published, not read."""
    unknown: tuple[str, ...] = ()
    """Models and tasks of which not even that is known."""


@dataclass(frozen=True)
class KindEstimate:
    """Runs of one model, mode and method, one after the other on a whole card."""

    card: str
    model: str
    mode: str
    method: str
    runs: int
    least_bytes: int
    """Memory of the smallest card that holds them"""
    peak_bytes: int | None
    """The most bytes of tensors in any stage, at the budgets that the card would have; None where none fit."""
    seconds: float | None
    too_small: str | None
    """Why the card cannot hold them."""


def plan_sizes(plan: Plan) -> Sizes:
    return Sizes(plan.dims, plan.examples.sizes)


def known_sizes(config: SweepConfig, examples: Examples | None) -> Sizes:
    """Of a sweep that is not ready: what is there is read, and published sizes stand in for the rest.

    examples: None where they are not there.
    """
    dims: dict[str, ModelDims | None] = {}
    assumed = []
    for model in config.models:
        name = short_name(model)
        try:
            dims[name] = check_checkpoint(model).dims
        except NotReadyError:
            dims[name] = published_dims(name)
            assumed.append(name)
    tasks: dict[str, TaskSizes | None] = dict(examples.sizes) if examples else {}
    if examples is None:
        tasks = {name: published_sizes([task.name for task in tasks_named(name)]) for name in config.tasks}
        assumed += config.tasks
    found = dims | tasks
    return Sizes(
        {name: value for name, value in dims.items() if value},
        {name: value for name, value in tasks.items() if value},
        tuple(name for name in assumed if found[name]),
        tuple(name for name, value in found.items() if not value),
    )


def estimate(
    config: SweepConfig, trainings: Sequence[CellAtPoint | Run], sizes: Sizes, cards: Sequence[Card]
) -> list[KindEstimate]:
    """Estimate the trainings of the backend torch whose sizes are known, by kind and card."""
    kinds: dict[Kind, list[Training]] = {}
    for training in trainings:
        cell, model = training.cell, short_name(training.cell.model)
        if cell.backend == "torch" and model in sizes.dims and cell.task in sizes.tasks:
            memory = CellMemory(sizes.dims[model], cell.mode, cell.method, training.own_protocol, cell.sparsity)
            kinds.setdefault((model, cell.mode, cell.method), []).append((memory, sizes.tasks[cell.task]))
    return [_estimate(config, kind, runs, card) for kind, runs in kinds.items() for card in cards]


def _estimate(config: SweepConfig, kind: Kind, runs: Sequence[Training], card: Card) -> KindEstimate:
    """All runs have the budgets of the one that takes the most memory."""
    largest = max(dict.fromkeys(cell for cell, _ in runs), key=lambda cell: least_card_bytes(cell, config.budgets))
    peak, seconds, why = None, None, None
    if config.protocol.precision == "bfloat16" and not card.has_bfloat16:
        why = "it does not compute in bfloat16"
    else:
        try:
            budgets = budgets_for(card.memory_bytes, 1.0, largest, config.budgets)
        except TooLargeError as error:
            why = str(error)
        else:
            peak = largest.peak(budgets)
            seconds = sum(CellSeconds(cell, card, budgets, task).total for cell, task in runs)
    return KindEstimate(card.name, *kind, len(runs), least_card_bytes(largest, config.budgets), peak, seconds, why)


def estimate_lines(found: Sequence[KindEstimate], sizes: Sizes) -> list[str]:
    """A table for people: a line for kinds that need the same memory, a column for each card."""
    if not found:
        return [_unknown(sizes)] if sizes.unknown else []
    by_card = {card: [kind for kind in found if kind.card == card] for card in dict.fromkeys(k.card for k in found)}
    rows: dict[tuple[Any, ...], list[tuple[KindEstimate, ...]]] = {}
    for kinds in zip(*by_card.values(), strict=True):  # one kind on each card
        memory = ((kind.least_bytes, kind.peak_bytes) for kind in kinds)
        rows.setdefault((kinds[0].model, kinds[0].mode, *memory), []).append(kinds)
    totals = (_total(kinds) for kinds in by_card.values())
    table = [("", "", "", "", *by_card), *map(_row, rows.values()), ("all that fit", "", "", "", *totals)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    heading = f"On one whole GPU, by a formula: peak memory, and time of the runs at assumed speeds{_assumed(sizes)}:"
    return [heading, *lines, *([_unknown(sizes)] if sizes.unknown else [])]


def _total(kinds: Sequence[KindEstimate]) -> str:
    seconds = [kind.seconds for kind in kinds if kind.seconds is not None]
    return duration(sum(seconds)) if seconds else "none"


def _row(alike: Sequence[tuple[KindEstimate, ...]]) -> tuple[str, ...]:
    """alike: kinds of one model and mode, each on every card."""
    first, methods = alike[0][0], " ".join(kinds[0].method for kinds in alike)
    least = f"{sum(kinds[0].runs for kinds in alike)} runs, from {first.least_bytes / 1e9:.3g} GB"
    return (first.model, first.mode, methods, least, *map(_shown, zip(*alike, strict=True)))


def _shown(alike: Sequence[KindEstimate]) -> str:
    """alike: kinds of the same memory on one card."""
    seconds = [kind.seconds for kind in alike if kind.seconds is not None]
    if alike[0].peak_bytes is None or not seconds:
        return "too small" if "GB" in (alike[0].too_small or "") else "no bfloat16"
    return f"{alike[0].peak_bytes / 1e9:.3g} GB, {duration(sum(seconds))}"


def _assumed(sizes: Sizes) -> str:
    return f", published sizes of {', '.join(sizes.assumed)} assumed" if sizes.assumed else ""


def _unknown(sizes: Sizes) -> str:
    return f"No estimate with {', '.join(sizes.unknown)}: not here, and no published size is known."
