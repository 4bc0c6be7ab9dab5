"""The identity of a computation: a hash of everything that changes their numbers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

NUMERICS_VERSION = 4
"""Raised by hand when trained numbers would change; each raise has a line in CHANGELOG.md."""


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
