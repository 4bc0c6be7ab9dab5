"""When masks change: the schedules, and the updates that each plans. Functions of steps and sparsities alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol as Interface

ONE_SHOT, ITERATIVE = "one-shot", "iterative"


@dataclass(frozen=True)
class Update:
    """One change of all masks, after the optimizer step of this number."""

    step: int
    """from 1"""
    sparsity: float
    """of the masks after it"""
    drop_fraction: float = 0.0
    """of the kept weights, dropped and grown elsewhere"""


class Settings(Interface):
    """What plans read of `tune_sparse.config.ScheduleSettings`."""

    update_from: float | None
    update_to: float | None
    gradual_updates: int
    gradual_curve: str
    update_every: int
    drop_fraction: float
    drop_curve: str
    levels: tuple[float, ...] | None
    steps_per_level: int | None


Plan = Callable[[Settings, float, int], list[Update]]
"""(settings, target sparsity, steps of the training) -> updates in the order of their steps"""


def no_updates(settings: Settings, target: float, steps: int) -> list[Update]:
    """The masks stay as they are."""
    return []


def gradual_updates(settings: Settings, target: float, steps: int) -> list[Update]:
    """Sparsity rises from 0 to `target` in K updates between two fractions of the steps, the last exactly at the end.

    Linear; cubic as Zhu & Gupta 2017 (arXiv:1710.01878, eq. 1).
    """
    first = max(1, math.floor(_or(settings.update_from, 0.15) * steps))
    last = math.floor(_or(settings.update_to, 0.85) * steps)
    count = min(settings.gradual_updates, last - first)
    rise = {"linear": lambda done: done, "cubic": lambda done: 1 - (1 - done) ** 3}[settings.gradual_curve]
    return [
        Update(first + math.floor(k * (last - first) / count + 0.5), target * rise(k / count))
        for k in range(1, count + 1)
    ]


def regrowing_updates(settings: Settings, target: float, steps: int) -> list[Update]:
    """Every `update_every` steps a fraction of the kept weights is dropped and as many are grown (SET: Mocanu et al.
    2018, arXiv:1707.04780; RigL: Evci et al. 2020, arXiv:1911.11134), which falls to 0 as a half cosine."""
    first, last = _or(settings.update_from, 0.0) * steps, math.floor(_or(settings.update_to, 0.75) * steps)
    at = [step for step in range(settings.update_every, last, settings.update_every) if step > first]
    share = {"constant": lambda step: 1.0, "cosine": lambda step: (1 + math.cos(math.pi * step / last)) / 2}
    drop = share[settings.drop_curve]
    return [Update(step, target, settings.drop_fraction * drop(step)) for step in at]


LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8)


@dataclass(frozen=True)
class Level:
    """One level of a chain: the weights are pruned to it, then tuned."""

    sparsity: float
    steps: int
    """of its own tuning"""


def planned_levels(settings: Settings, target: float, steps: int) -> list[Level]:
    """The levels below `target`, closed by it, each with its steps: `steps_per_level`, or its part of `steps`.

    What cannot be divided goes to the first levels, one step each, so that every level but the last is also the last
    of the chain that ends with it.
    """
    on_the_way = LEVELS if settings.levels is None else settings.levels
    sparsities = (*(level for level in on_the_way if level < target), target)
    if settings.steps_per_level is not None:
        return [Level(sparsity, settings.steps_per_level) for sparsity in sparsities]
    share, more = divmod(steps, len(sparsities))
    return [Level(sparsity, share + (number < more)) for number, sparsity in enumerate(sparsities)]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The facts of a schedule. Nobody else asks a schedule for its name."""

    about: str
    """For a help."""
    plan: Plan = no_updates
    """The updates of one training."""
    settings: tuple[str, ...] = ()
    """Those of `tune_sparse.config.ScheduleSettings` that it reads: part of the identity of its runs."""
    starts_dense: bool = False
    """Its training begins with every weight."""
    in_levels: bool = False
    """A training of it is a chain of levels, each of them a run that begins from the one before."""
    grows: str | None = None
    """By what dropped weights are replaced: "random", or the dense "gradient"; None if they are not."""


REGROWING = ("update_from", "update_to", "update_every", "drop_fraction", "drop_curve", "start_from")
SCHEDULES = {
    ONE_SHOT: Schedule(about="masks are made before the training and stay"),
    "gradual": Schedule(
        about="the training begins with every weight, and masks grow in steps (GMP: gradual magnitude pruning)",
        plan=gradual_updates,
        settings=("update_from", "update_to", "gradual_updates", "gradual_curve", "revivable"),
        starts_dense=True,
    ),
    ITERATIVE: Schedule(
        about="level after level: the weights as they are by then are pruned further, then tuned",
        settings=("levels", "rescore"),
        in_levels=True,
    ),
    "set": Schedule(
        about="at one sparsity, the smallest weights are dropped and others grown at random (SET)",
        plan=regrowing_updates,
        settings=REGROWING,
        grows="random",
    ),
    "rigl": Schedule(
        about="at one sparsity, the smallest weights are dropped and those of the largest gradient grown (RigL)",
        plan=regrowing_updates,
        settings=REGROWING,
        grows="gradient",
    ),
}
