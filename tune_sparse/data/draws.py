"""Some of many, drawn by a fixed seed: the same for every cell, whatever the sweep's seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence


def drawn(kinds: Sequence[str], count: int | None, seed: str) -> list[int]:
    """Positions of `count` items in rising order; of all of them where there are no more, or `count` is None.

    kinds: of each item. Every kind has its share of `count` to within one, and a larger draw holds every smaller one.
    """
    if count is None or count >= len(kinds):
        return list(range(len(kinds)))
    positions: dict[str, list[int]] = {}
    for position, kind in enumerate(kinds):
        positions.setdefault(kind, []).append(position)
    for kind, found in positions.items():
        random.Random(f"{seed}/{kind}").shuffle(found)
    shares = shared_out({kind: len(found) for kind, found in positions.items()}, count)
    return sorted(position for kind, found in positions.items() for position in found[: shares[kind]])


def shared_out(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """{kind: how many of the count}, proportional to its size to within one; none shrinks where `count` grows.

    One at a time, each to the kind that is furthest behind of those not ahead of their share: the quota method
    (Balinski & Young 1975, "The quota method of apportionment").
    """
    taken, total = dict.fromkeys(sizes, 0), sum(sizes.values())
    for number in range(1, count + 1):
        waiting = (kind for kind in sorted(sizes) if taken[kind] * total < number * sizes[kind])
        taken[max(waiting, key=lambda kind: sizes[kind] / (taken[kind] + 1))] += 1
    return taken
