"""Cards by name: their memory, bfloat16 or not, and rates that are assumed until a run was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tune_sparse.errors import unknown_name

MIB = 1 << 20


@dataclass(frozen=True)
class Card:
    """A kind of GPU. Its rates are assumed: what large matrix products and copies of large tensors achieve."""

    name: str
    memory_bytes: int
    """in total, as the driver says"""
    flops: float
    """assumed operations a second in bfloat16, or in float32 where it has no bfloat16"""
    float32_flops: float
    """the same in float32, without TF32"""
    bandwidth: float
    """assumed bytes a second"""
    has_bfloat16: bool = True
    """compute capability 8.0 or higher"""

    def rate(self, precision: str) -> float:
        """Operations a second in a precision of a protocol."""
        return self.flops if precision == "bfloat16" else self.float32_flops


CARDS = {
    card.name: card
    for card in (
        Card("A100-40", 40_960 * MIB, 2.0e14, 1.5e13, 1.2e12),
        Card("A100-80", 81_920 * MIB, 2.0e14, 1.5e13, 1.6e12),
        Card("H100-80", 81_559 * MIB, 4.5e14, 4.5e13, 2.7e12),
        Card("H200", 143_771 * MIB, 4.5e14, 4.5e13, 3.9e12),
        Card("B200", 183_359 * MIB, 1.1e15, 5.5e13, 6.4e12),
        Card("L40S", 46_068 * MIB, 1.8e14, 6.0e13, 7.0e11),
        Card("L4", 23_034 * MIB, 6.0e13, 1.5e13, 2.4e11),
        Card("A10", 23_028 * MIB, 6.0e13, 1.5e13, 4.8e11),
        Card("RTX-3090", 24_576 * MIB, 5.5e13, 2.0e13, 7.5e11),
        Card("RTX-4090", 24_564 * MIB, 1.3e14, 5.0e13, 8.0e11),
        Card("V100-32", 32_768 * MIB, 1.2e13, 1.2e13, 7.2e11, has_bfloat16=False),
        Card("T4", 15_360 * MIB, 5.0e12, 5.0e12, 2.4e11, has_bfloat16=False),
    )
}
SHOWN = ("A100-80", "H100-80", "H200")
"""The cards of a forecast that asks for no other."""


def card_named(name: str) -> Card:
    """The entry of a card; without gigabytes, that with the most. Raises `InputError` for one that the table lacks."""
    card = CARDS.get(name) or find_card(name)
    if card is None:
        raise unknown_name("GPU", name, CARDS)
    return card


def find_card(driver_name: str, memory_bytes: float = float("inf")) -> Card | None:
    """The card that a driver, or Ray, calls so, the largest with no more memory than that; None if the table lacks it.

    >>> find_card("NVIDIA A100-SXM4-40GB", 42_400_000_000).name, find_card("H100").name
    ('A100-40', 'H100-80')
    """
    words = driver_name.upper().replace("-", " ").split()
    named = [card for card in CARDS.values() if _is_named(card, words)]
    fitting = [card for card in named if card.memory_bytes <= memory_bytes * 1.05] or named[:1]
    return max(fitting, key=lambda card: card.memory_bytes, default=None)


def _is_named(card: Card, words: Iterable[str]) -> bool:
    """By its model: the part of its name that is no number of gigabytes."""
    model = [part for part in card.name.split("-") if part not in ("RTX", "40", "80", "32")]
    return model[0] in words
