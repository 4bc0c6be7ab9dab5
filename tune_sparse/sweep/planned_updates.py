"""The updates of masks that the schedules of a sweep plan, as it says before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from tune_sparse.config import SweepConfig
from tune_sparse.schedules import SCHEDULES, Update

SHOWN = 6
"""More steps or values than these are shortened in the middle."""


@dataclass(frozen=True)
class PlannedUpdates:
    """The updates of masks in each training by one schedule to one sparsity."""

    schedule: str
    sparsity: float
    updates: tuple[Update, ...]

    @property
    def text(self) -> str:
        """For people: the same for sparsities that do the same."""
        at = _short(f"{update.step}" for update in self.updates)
        if SCHEDULES[self.schedule].grows:
            done = f"dropping {_short(f'{update.drop_fraction:.2g}' for update in self.updates)} of the kept weights"
        else:
            done = f"to sparsities {_short(f'{update.sparsity:.3g}' for update in self.updates)}"
        return f"{len(self.updates)} updates, after steps {at}, {done}"


def planned_updates(config: SweepConfig) -> list[PlannedUpdates]:
    """Those of each schedule and sparsity that has any; of several points of axes each that plans others."""
    trainings = [(config.schedule_settings_at(point), config.protocol_at(point).steps) for point in config.points]
    planned = (
        PlannedUpdates(schedule, sparsity, tuple(SCHEDULES[schedule].plan(settings, sparsity, steps)))
        for schedule, sparsity in product(config.schedules, filter(None, config.sparsities))
        for settings, steps in trainings
    )
    return [found for found in dict.fromkeys(planned) if found.updates]


def planned_lines(planned: Sequence[PlannedUpdates]) -> list[str]:
    """For people, a line for each schedule and what it does; none where no mask changes."""
    together: dict[tuple[str, str], list[str]] = {}
    for found in planned:
        together.setdefault((found.schedule, found.text), []).append(f"{found.sparsity:g}")
    lines = [f"  {schedule} at {' '.join(at)}: {text}" for (schedule, text), at in together.items()]
    return ["Updates of masks in each training:", *lines] if lines else []


def _short(texts: Iterable[str]) -> str:
    found = list(texts)
    return " ".join(found if len(found) <= SHOWN else [*found[: SHOWN - 3], "...", *found[-2:]])
