"""The cells of a sweep at each point of its axes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from tune_sparse.config import LORA_SETTINGS, Cell, Protocol, ScheduleSettings, SweepConfig
from tune_sparse.config.axes import OWNERS, Point, settings_of
from tune_sparse.config.cerebras import UNTOUCHED_ON_CEREBRAS
from tune_sparse.config.protocol import CALIBRATION_SETTINGS
from tune_sparse.errors import InputError
from tune_sparse.modes import MODES
from tune_sparse.pruning.methods import METHODS
from tune_sparse.schedules import SCHEDULES


@dataclass(frozen=True)
class CellAtPoint:
    """A cell with the settings that it is trained with at one point of a sweep's axes."""

    cell: Cell
    point: Point
    """of the axes that it reads"""
    protocol: Protocol
    schedule_settings: ScheduleSettings

    @property
    def own_protocol(self) -> Protocol:
        """As a `Run` has it."""
        return self.protocol

    @property
    def trained(self) -> CellAtPoint:
        """With the cell whose training serves this one."""
        return replace(self, cell=self.cell.trained)


def reads_setting(cell: Cell, name: str, recover: str) -> bool:
    """Whether a setting changes the training of a cell that is trained with this `recover`."""
    is_pruned = cell.sparsity > 0 and cell.method in METHODS
    if name in LORA_SETTINGS:
        return MODES[cell.mode].has_adapter
    if name in CALIBRATION_SETTINGS:
        return is_pruned and (METHODS[cell.method].is_calibrated or recover != "none")
    if name == "recover":
        return is_pruned
    if OWNERS[name][0] is ScheduleSettings:
        return name in SCHEDULES[cell.schedule].settings
    return cell.backend != "cerebras" or name not in UNTOUCHED_ON_CEREBRAS


def at_points(config: SweepConfig, cell: Cell) -> list[CellAtPoint]:
    """A cell at each point of a sweep, in the order of the points; one that ignores an axis is there once for all of
    its values, with the sweep's own."""
    return list(dict.fromkeys(_at_point(config, cell, point) for point in config.points))


def _at_point(config: SweepConfig, cell: Cell, point: Point) -> CellAtPoint:
    recover = config.protocol_at(point).recover
    read = tuple((name, value) for name, value in point if reads_setting(cell.trained, name, recover))
    return CellAtPoint(cell, read, config.protocol_at(read), config.schedule_settings_at(read))


def check_axes_are_read(config: SweepConfig, cells: list[Cell]) -> None:
    """Raise `InputError` for an axis that no cell reads at any point: it would repeat the same trainings."""
    trained = dict.fromkeys(cell.trained for cell in cells)
    recovers = {protocol.recover for protocol in config.protocols}
    for name in (name for axis in config.axes for name in settings_of(axis)):
        if not any(reads_setting(cell, name, recover) for cell, recover in product(trained, recovers)):
            raise InputError(
                f"an axis must change some training, got {name}, which every mode, method, schedule and backend of "
                "this sweep ignores. Leave it out, or add what reads it."
            )
