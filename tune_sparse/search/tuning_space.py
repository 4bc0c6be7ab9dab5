"""The settings of a training that are searched, and the values that each may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tune_sparse.config import SweepConfig
from tune_sparse.config.axes import NO_AXIS, OWNERS
from tune_sparse.config.options import converted, rule
from tune_sparse.errors import InputError, unknown_name

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

CELL = {"method": "methods", "sparsity": "sparsities", "mode": "modes", "schedule": "schedules"}
"""{part of a cell that can be searched: its field of `SweepConfig`}"""
LOG, BETWEEN = "log:", ":"
Point = dict[str, Any]
"""{setting: its value}"""


@dataclass(frozen=True)
class Dimension:
    """One setting and the values it may take."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    """A range, where there are no choices; of whole numbers if both ends are."""
    is_log: bool = False

    @property
    def corners(self) -> tuple[Any, ...]:
        """The values that are checked before anything is trained: all choices, or both ends."""
        return self.choices or (self.low, self.high)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.is_log)
        return FloatDistribution(self.low, self.high, log=self.is_log)


def space_from(texts: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """A space from {setting: values}, values as text or YAML has them: `16,32` or a list, a range `100:400`, or a range
    on a logarithmic scale, `log:1e-5:1e-2`. Raises `InputError` for a setting that cannot be searched."""
    rule(
        len(texts) > 0, "a space must name at least one setting", dict(texts), "Give learning_rate=log:1e-5:1e-3, say."
    )
    return tuple(_dimension(str(name), values) for name, values in texts.items())


def _dimension(name: str, values: Any) -> Dimension:
    if name not in CELL and name not in OWNERS:
        raise unknown_name("setting", name, {**CELL, **OWNERS})
    if name in NO_AXIS:
        raise InputError(f"{name} cannot be searched: {NO_AXIS[name]}. Leave it out.")
    if isinstance(values, str) and BETWEEN in values:
        return _range(name, values)
    listed = values.split(",") if isinstance(values, str) else list(values) if isinstance(values, list) else [values]
    choices = tuple(_typed(name, value) for value in listed)
    rule(len(set(choices)) == len(choices) > 1, f"{name} must have two different values", values, "Use --set for one.")
    return Dimension(name, choices)


def _range(name: str, text: str) -> Dimension:
    ends = text.removeprefix(LOG).split(BETWEEN)
    rule(len(ends) == 2, f"a range of {name} has two ends", text, "Write 1e-5:1e-3 or log:1e-5:1e-3.")
    low, high = (_typed(name, end) for end in ends)
    for end in (low, high):
        is_number = isinstance(end, int | float) and not isinstance(end, bool)
        rule(is_number, f"a range of {name} is of numbers", text, "List its values, with commas.")
    rule(low < high, f"a range of {name} rises", text, "Turn it round.")
    rule(not text.startswith(LOG) or low > 0, f"a logarithmic range of {name} is above 0", text, "Raise its lower end.")
    return Dimension(name, (), low, high, text.startswith(LOG))


def _typed(name: str, value: Any) -> Any:
    if name in OWNERS:
        return converted(*OWNERS[name], value)
    field = SweepConfig.__dataclass_fields__[CELL[name]]
    [one] = converted(SweepConfig, field, [value])
    return one
