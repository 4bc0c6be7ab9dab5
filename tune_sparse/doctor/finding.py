"""One thing that a doctor looked at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    what: str
    is_well: bool
    found: str
    fix: str = ""
    """what to do where it is not well"""


def finding(what: str, is_well: bool, found: str, fix: str) -> Finding:
    """With the fix only where one is needed."""
    return Finding(what, is_well, found, "" if is_well else fix)
