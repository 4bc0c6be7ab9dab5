"""Fields of a configuration: their help and default, the rules of their values, and text turned into their type."""

from __future__ import annotations

import math
import os
import types
from dataclasses import MISSING, Field, field
from fractions import Fraction
from typing import Any, Union, get_args, get_origin, get_type_hints

from tune_sparse.errors import InputError


def option(
    help: str, default: Any = MISSING, *, metavar: str = "", unset: str = "", choices: Any = (), heading: str = ""
) -> Any:
    """A field with what a help says of it.

    unset: the meaning of a default that is empty or missing. choices: {value: its meaning}, or values whose names say
    it. heading: begins a group of settings.
    """
    texts = {"help": help, "metavar": metavar, "unset": unset, "choices": choices, "heading": heading}
    return field(default=default, metadata=texts)


def describe_option(at: Field[Any]) -> str:
    """The text of a field with its choices and its default."""
    metadata = at.metadata
    choices = metadata["choices"]
    meant = [f"{name}: {meaning}" for name, meaning in choices.items()] if isinstance(choices, dict) else choices
    listed = f" ({'; '.join(meant)})" if isinstance(choices, dict) else f": {' or '.join(meant)}" if meant else ""
    return f"{metadata['help']}{listed} (default: {_default_text(at)})"


def _default_text(at: Field[Any]) -> str:
    if at.default is MISSING:
        return str(at.metadata["unset"])
    return ", ".join(filter(None, (value_text(at.default), at.metadata["unset"])))


def value_text(value: Any) -> str:
    """A value as a user writes it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def rule(holds: bool, text: str, value: Any, fix: str) -> None:
    if not holds:
        raise InputError(f"{text}, got {value!r}. {fix}")


def converted(owner: type, at: Field[Any], value: Any) -> Any:
    """`value` as the declared type of a field, or an `InputError` that names the field."""
    declared = get_type_hints(owner)[at.name]
    try:
        return _as_type(declared, value)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        wanted = getattr(declared, "__name__", None) if not get_args(declared) else None
        raise InputError(
            f"{at.name} ({at.metadata['help']}) must be {wanted or declared}, got {value!r} ({error}). Fix the value."
        ) from error


def _as_type(declared: Any, value: Any) -> Any:
    if get_origin(declared) in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _as_type(get_args(declared)[0], value)
    if get_origin(declared) is tuple:
        return tuple(_as_type(get_args(declared)[0], item) for item in listed(value))
    if declared is bool:
        return _as_bool(value)
    if isinstance(value, bool):
        raise TypeError("a yes or no is not a number")
    if declared is int and isinstance(value, float) and not value.is_integer():
        raise ValueError("not a whole number")
    if declared is str and not isinstance(value, str | os.PathLike):
        raise TypeError("not a text")
    is_ratio = declared is float and isinstance(value, str) and "/" in value
    result = float(Fraction(value)) if is_ratio else declared(value)
    if declared is float and not math.isfinite(result):
        raise ValueError("not finite")
    return result


def listed(value: Any) -> list[Any]:
    """The items of a value: several, one, or a text of several."""
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    return list(items) if isinstance(items, list | tuple) else [items]


def _as_bool(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError("neither true nor false")
    return str(value).lower() == "true"
