"""Checks of a machine, a Ray cluster and a Cerebras environment."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    is_well: bool
    found: str
    fix: str = ""
    """what to do where it is not well"""


def check(what: str, is_well: bool, found: str, fix: str) -> Check:
    """Make a `Check` that has the fix only where one is needed."""
    return Check(what, is_well, found, "" if is_well else fix)
