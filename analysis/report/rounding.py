"""Numbers for people: to the digits that their uncertainty leaves."""

from __future__ import annotations

import math

UNKNOWN = "–"


def rounded(value: float | None, stderr: float | None = None, digits: int = 3) -> str:
    """`value` down to the first digit of its standard error; to `digits` significant ones where none is known.

    rounded(0.9130, 0.0285) is 0.91: the error begins in the second decimal.
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if stderr and math.isfinite(stderr):
        return f"{value:.{max(0, -math.floor(math.log10(abs(stderr))))}f}"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        whole = math.floor(math.log10(abs(value))) if value else 0
        return f"{value:,.{max(0, digits - 1 - whole)}f}"
    return f"{value:.{digits - 1}e}"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A difference and its interval, all to the digits that the interval leaves."""
    if value is None or low is None or high is None or not all(map(math.isfinite, (value, low, high))):
        return rounded(value)
    stderr = (high - low) / 4
    return f"{_signed(value, stderr)} ({_signed(low, stderr)} to {_signed(high, stderr)})"


def _signed(value: float, stderr: float) -> str:
    return ("+" if value > 0 else "") + rounded(value, stderr)
