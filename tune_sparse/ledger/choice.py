"""Which setting of a sweep's axes counts for each cell: a pointer, found anew whenever a ledger is read.

The setting of the lowest loss on selection examples is chosen. Nothing that was measured on test examples is looked at.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from tune_sparse.config import Cell, ScheduleSettings
from tune_sparse.config.axes import settings_of
from tune_sparse.config.options import value_text
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.record import Record, SweepRecord, has_ended
from tune_sparse.schedules import ONE_SHOT, SCHEDULES

Setting = Mapping[str, Any]
"""{name of a setting: its value}: one point of a sweep's axes, as far as a cell reads them"""
ReadRecord = Callable[[str], Record | None]
CURVE_POINT = tuple(f.name for f in fields(Cell) if f.name != "seed")
"""What makes a cell over its seeds, for which one setting is chosen."""


@dataclass(frozen=True)
class RequestedCell:
    """A cell at one setting, as a sweep requested it."""

    row: Mapping[str, Any]
    """of a `SweepRecord`"""
    axes: Mapping[str, list[Any]]
    """of the sweep: {setting, or settings that go together: values}"""
    schedule_settings: tuple[tuple[str, Any], ...] = ()
    """(name, value) of those that its schedule reads and the sweep has for all of its cells"""

    @property
    def schedule(self) -> str:
        return str(self.row.get("schedule", ONE_SHOT))

    @property
    def setting(self) -> Setting:
        values = self.row.get("axes", {})
        return {name: plain(value) for name, value in values.items()}

    @property
    def run_id(self) -> str:
        return str(self.row["run_id"])

    @property
    def candidates_key(self) -> tuple[Any, ...]:
        """The same for all settings and seeds among which one setting is chosen."""
        settings = axes_key(self.axes), self.schedule_settings
        return (*(self.row.get(name, ONE_SHOT) for name in CURVE_POINT), *settings)


@dataclass(frozen=True)
class Choice:
    """The settings of one cell over its seeds, and the one that counts."""

    losses: tuple[tuple[Setting, float | None], ...]
    """(setting, mean loss over its seeds; None where not all of them are done) in the order of the sweep"""
    failed: int
    """settings with a run that failed or was stopped, which are out"""
    waiting: int
    """settings with a run that has not ended"""

    @property
    def chosen(self) -> Setting | None:
        """The only setting; or that of the lowest loss, of equal ones the earlier; None while a run of any has not
        ended, or where all are out."""
        place = lowest([loss for _, loss in self.losses])
        return None if place is None or (self.waiting and len(self.losses) > 1) else self.losses[place][0]

    @property
    def why_not(self) -> str:
        """Why none is chosen; empty where one is."""
        if self.chosen is not None:
            return ""
        count = len(self.losses)
        if not self.waiting:
            return f"not chosen: each of {count} settings has a run that failed or was stopped"
        return f"not chosen: {count - self.waiting} of {count} settings done"


def lowest(losses: Sequence[float | None]) -> int | None:
    """The place of the lowest loss that is known, of equal ones the earlier; None where none is. A single place needs
    no loss."""
    known = [(loss, place) for place, loss in enumerate(losses) if loss is not None]
    return 0 if len(losses) == 1 else min(known)[1] if known else None


def mean_loss(losses: Sequence[float | None]) -> float | None:
    """Over the seeds of a setting; None unless there are some, and each has one."""
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if known and len(known) == len(losses) else None


def axes_key(axes: Mapping[str, Sequence[Any]]) -> str:
    """The same for axes of the same values, in whatever order."""
    return json.dumps({name: sorted(axes[name], key=json.dumps) for name in sorted(axes)}) if axes else ""


def requested_cells(sweeps: Iterable[SweepRecord]) -> list[RequestedCell]:
    """Each cell of some sweeps as the oldest requested it.

    A cell that one sweep has with axes and another without, or with other axes, is there for each: these are two
    studies. But where a sweep has a cell at all settings of another and at more, the other's choice is superseded.
    """
    found: dict[str, dict[str, RequestedCell]] = defaultdict(dict)
    for sweep in sweeps:
        axes = sweep.config.get("axes", {})
        for row in sweep.cells:
            cell = RequestedCell(row, axes, _schedule_settings(sweep, row))
            found[row["cell_id"]].setdefault(axes_key(axes), cell)
    return [
        cell
        for same in found.values()
        for cell in same.values()
        if not any(_extends(other.axes, cell.axes) for other in same.values())
    ]


def _schedule_settings(sweep: SweepRecord, row: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """As `RequestedCell` has them: levels as the sweep asked for them, of which a run has those up to its own."""
    schedule = SCHEDULES[row.get("schedule", ONE_SHOT)]
    asked = {name: plain(value) for name, value in sweep.config.get("schedule_settings", {}).items()}
    tuned = {name for axis in sweep.config.get("axes", {}) for name in settings_of(axis)}
    read = schedule.read(ScheduleSettings(**{name: asked[name] for name in schedule.settings if name in asked}))
    return tuple((name, value) for name, value in read.items() if name not in tuned)


def plain(value: Any) -> Any:
    """A value of JSON as a setting has it."""
    return tuple(value) if isinstance(value, list) else value


def schedule_names(cells: Iterable[RequestedCell]) -> dict[tuple[str, tuple[tuple[str, Any], ...]], str]:
    """{(schedule, its settings): what tables call it}: the settings that tell one from another of these cells are
    named, so that nothing joins or averages the two."""
    kinds: dict[str, dict[tuple[tuple[str, Any], ...], None]] = defaultdict(dict)
    for cell in cells:
        kinds[cell.schedule][cell.schedule_settings] = None
    names = {}
    for schedule, variants in kinds.items():
        shared = set.intersection(*map(set, variants))
        for settings in variants:
            own = [f"{name}={value_text(value)}" for name, value in settings if (name, value) not in shared]
            names[schedule, settings] = " ".join([schedule, *own])
    return names


def _extends(more: Mapping[str, Sequence[Any]], axes: Mapping[str, Sequence[Any]]) -> bool:
    """Whether axes have every value of others, and more."""
    if not axes or more.keys() != axes.keys() or axes_key(more) == axes_key(axes):
        return False
    return all(value in more[name] for name in axes for value in axes[name])


def choices(cells: Iterable[RequestedCell], record: ReadRecord) -> dict[tuple[Any, ...], Choice]:
    """{candidates_key: the choice among these cells}"""
    grouped: dict[tuple[Any, ...], dict[str, list[RequestedCell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        grouped[cell.candidates_key][json.dumps(cell.setting)].append(cell)
    return {key: _choice([*by_setting.values()], record) for key, by_setting in grouped.items()}


def _choice(by_setting: Sequence[Sequence[RequestedCell]], record: ReadRecord) -> Choice:
    """by_setting: the seeds of each setting"""
    ended = [[record(cell.run_id) for cell in seeds] for seeds in by_setting]
    losses = [mean_loss([selection_loss(found) if found else None for found in records]) for records in ended]
    waits = [not all(map(has_ended, records)) for records in ended]
    failed = sum(loss is None and not waiting for loss, waiting in zip(losses, waits, strict=True))
    settings = (seeds[0].setting for seeds in by_setting)
    return Choice(tuple(zip(settings, losses, strict=True)), failed, sum(waits))


def selection_loss(record: Record) -> float | None:
    """The loss of a run's final model, merged and masked, on selection examples; None of one that is not done."""
    return record.metrics.get("eval_loss") if record.status == "done" else None


def chosen_runs(ledger: LedgerReader) -> dict[str, bool]:
    """{run that an axis has: whether it is chosen for some cell}, of all sweeps with axes."""
    cells = [cell for cell in requested_cells(ledger.sweeps()) if cell.axes]
    found, counts = choices(cells, ledger.record), dict[str, bool]()
    for cell in cells:
        is_chosen = found[cell.candidates_key].chosen == cell.setting
        counts[cell.run_id] = counts.get(cell.run_id, False) or is_chosen
    return counts
