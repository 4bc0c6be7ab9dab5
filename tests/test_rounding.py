"""Numbers to the digits that their uncertainty leaves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.report.rounding import UNKNOWN, rounded, with_interval


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.9130, 0.0285, "0.91"),
        (0.9130, 0.0049, "0.913"),
        (0.5, 0.5, "0.5"),
        (123.4, 12.0, "123"),
        (0.25, None, "0.250"),
        (0.25, 0.0, "0.250"),
        (12.345, None, "12.3"),
        (1234.5, None, "1,234"),
        (2_368_733_184.0, None, "2.37e+09"),
        (0.0000123, None, "1.23e-05"),
        (0.0, None, "0.00"),
        (None, None, UNKNOWN),
        (math.nan, 0.1, UNKNOWN),
    ],
)
def test_digits_end_where_doubt_begins(value: float | None, stderr: float | None, text: str) -> None:
    assert rounded(value, stderr) == text


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 10))
def test_rounding_moves_a_number_by_less_than_its_error(value: float, stderr: float) -> None:
    assert abs(float(rounded(value, stderr)) - value) <= 0.5 * max(stderr, 1) + 1e-9


def test_a_difference_has_its_sign_and_its_interval() -> None:
    assert with_interval(0.1234, 0.02, 0.22) == "+0.12 (+0.02 to +0.22)"
    assert with_interval(-0.1, -0.3, 0.1) == "-0.1 (-0.3 to +0.1)"
    assert with_interval(-1.5, None, None) == "-1.50"
    assert with_interval(None, None, None) == UNKNOWN
