"""Axes beyond those of the matrix: settings of training or schedule that take several values in one sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from tune_sparse.config.options import converted, rule, value_text
from tune_sparse.config.protocol import SCORING, UNCOMPARED_SETTINGS, Protocol, in_order
from tune_sparse.config.schedule_settings import ScheduleSettings
from tune_sparse.errors import InputError, unknown_name

Axes = Mapping[str, tuple[Any, ...]]
"""{setting: its values, or settings joined by PAIRED: a tuple of values for each point}"""
Point = tuple[tuple[str, Any], ...]
"""(setting, value) of each axis"""
PAIRED = ":"
OWNERS = {f.name: (owner, f) for owner in (Protocol, ScheduleSettings) for f in fields(owner)}
"""{setting: (the dataclass that has it, its field)}"""
NO_AXIS = (
    dict.fromkeys(UNCOMPARED_SETTINGS, "it changes no number but the last bits")
    | dict.fromkeys(SCORING, "it changes how models are scored, and such scores cannot be compared")
    | dict.fromkeys(("n_train", "n_selection"), "it names the examples, which a sweep reads once")
    | {"train_on_prompt": "it changes what the loss on selection examples, by which a value is chosen, is a mean over"}
)
"""{setting that is no axis: why}"""


def settings_of(name: str) -> tuple[str, ...]:
    """The settings that an axis sets."""
    return tuple(name.split(PAIRED))


def typed_axes(axes: Any) -> dict[str, tuple[Any, ...]]:
    """Axes as YAML or text has them, each value as the type of its setting. Raises `InputError` for unknown names."""
    if not isinstance(axes, Mapping):
        raise InputError(
            f"axes must map settings to values, got {axes!r}. Write `axes: {{learning_rate: [1e-4, 3e-4]}}`, say."
        )
    return {str(name): tuple(_typed(str(name), value) for value in _values(values)) for name, values in axes.items()}


def _values(values: Any) -> Sequence[Any]:
    return values.split(",") if isinstance(values, str) else values if isinstance(values, list | tuple) else [values]


def _typed(axis: str, value: Any) -> Any:
    names = settings_of(axis)
    for name in names:
        if name not in OWNERS:
            raise unknown_name("axis", name, OWNERS)
    if len(names) == 1:
        return _setting(axis, value)
    values = value.split(PAIRED) if isinstance(value, str) else list(value)
    rule(len(values) == len(names), f"each point of the axis {axis} has {len(names)} values", value, "Give as many.")
    return tuple(_setting(name, one) for name, one in zip(names, values, strict=True))


def _setting(name: str, value: Any) -> Any:
    """A value as its setting has it, so that two orders of `train_also` are one."""
    owner, setting = OWNERS[name]
    found = converted(owner, setting, value)
    return in_order(found) if name == "train_also" else found


def check_axes(axes: Axes) -> None:
    """Raise `InputError` for a setting that is no axis, or on two of them, and for values that do not differ."""
    names = [name for axis in axes for name in settings_of(axis)]
    for name in names:
        if name not in OWNERS:
            raise unknown_name("axis", name, OWNERS)
        if name in NO_AXIS:
            raise InputError(f"{name} cannot be an axis: {NO_AXIS[name]}. Sweep each value into a folder of its own.")
        rule(names.count(name) == 1, f"{name} must be on one axis", tuple(axes), "Leave it out of the others.")
    for axis, values in axes.items():
        rule(len(values) > 1, f"the axis {axis} must have two values or more", values, "Add one, or use --set.")
        rule(len(set(values)) == len(values), f"the axis {axis} must not repeat a value", values, "Remove the repeats.")


def points_of(axes: Axes) -> tuple[Point, ...]:
    """Every combination of values, the first axis varying slowest; the one empty point without axes."""
    by_axis = [[_point(axis, value) for value in values] for axis, values in axes.items()]
    return tuple(sum(parts, ()) for parts in product(*by_axis))


def _point(axis: str, value: Any) -> Point:
    names = settings_of(axis)
    return tuple(zip(names, value if len(names) > 1 else (value,), strict=True))


def point_text(point: Point) -> str:
    """A point as a user writes it."""
    return " ".join(f"{name}={value_text(value)}" for name, value in point)


def axis_text(axis: str, value: Any) -> str:
    """A value of an axis as a user writes it: of paired settings all values of a point."""
    return PAIRED.join(value_text(one) for _, one in _point(axis, value))


def axis_values(axis: str, values: Iterable[Any]) -> str:
    """All values of an axis, one after the other."""
    return ", ".join(axis_text(axis, value) for value in values)


def own_settings(owner: type, point: Point) -> dict[str, Any]:
    """Those of a point that are settings of a dataclass."""
    return {name: value for name, value in point if OWNERS[name][0] is owner}


def explained(error: InputError, point: Point, protocol: Protocol) -> InputError:
    """The error of a point, with what to write where the decay would end above the learning rate."""
    values = dict(point)
    text = f"at {point_text(point)}: {error}"
    if "learning_rate" in values and "final_learning_rate" not in values and "final_learning_rate" in str(error):
        share = protocol.final_learning_rate / protocol.learning_rate
        pair = f"{values['learning_rate']:g}{PAIRED}{values['learning_rate'] * share:g}"
        text += f" Or pair the two, as --axis learning_rate{PAIRED}final_learning_rate={pair},..."
    return InputError(text)
