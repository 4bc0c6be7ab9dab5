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
