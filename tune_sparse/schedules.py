"""When masks change: the schedules, and the updates that each plans. Functions of steps and sparsities alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

ONE_SHOT, ITERATIVE = "one-shot", "iterative"
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8)
"""Sparsities on the way of a chain, of which a cell takes those below its own."""
MIN_UPDATES = 3
"""A training with fewer updates of its masks than that is refused: it hardly differs from a one-shot one."""


@dataclass(frozen=True)
class Update:
    """One change of all masks, after the optimizer step of this number."""

    step: int
    """from 1"""
    sparsity: float
    """of the masks after it"""
    drop_fraction: float = 0.0
    """of the kept weights, dropped and grown elsewhere"""


@dataclass(frozen=True)
class Level:
    """One level of a chain: the weights are pruned to it, then tuned."""

    sparsity: float
    steps: int
    """of its own tuning"""


Planner = Callable[[Mapping[str, Any], float, int], list[Update]]
"""(settings that the schedule reads, target sparsity, steps of the training) -> updates in the order of their steps"""

CURVES: Mapping[str, Callable[[float, float], float]] = {
    "linear": lambda target, done: target * done,
    "cubic": lambda target, done: target * (1 - (1 - done) ** 3),
    "exponential": lambda target, done: 1 - (1 - target) ** done,
}
"""(target sparsity, fraction of the updates that are done) -> sparsity. Cubic: Zhu & Gupta 2017 (arXiv:1710.01878,
eq. 1). Exponential: 1 - exp(gamma t) as in the GMP of cerebras_pytorch, its gamma such that the last is the target."""
DROP_CURVES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
"""fraction of the steps up to the last update -> fraction of the setting `drop_fraction` that is dropped"""


def gradual_updates(settings: Mapping[str, Any], target: float, steps: int) -> list[Update]:
    """Sparsity rises from 0 to `target` in K updates between two fractions of the steps, the last exactly at the end
    (GMP: gradual magnitude pruning)."""
    first = max(1, math.floor(settings["update_from"] * steps))
    last = math.floor(settings["update_to"] * steps)
    count = min(settings["gradual_updates"], last - first)
    curve = CURVES[settings["gradual_curve"]]
    at = [first + math.floor(k * (last - first) / count + 0.5) for k in range(1, count + 1)]
    return [Update(step, target if step == last else curve(target, k / count)) for k, step in enumerate(at, 1)]


def regrowing_updates(settings: Mapping[str, Any], target: float, steps: int) -> list[Update]:
    """Every `update_every` steps a fraction of the kept weights is dropped and as many are grown (SET: Mocanu et al.
    2018, arXiv:1707.04780; RigL: Evci et al. 2020, arXiv:1911.11134)."""
    first, last = (math.floor(settings[name] * steps) for name in ("update_from", "update_to"))
    share, every = DROP_CURVES[settings["drop_curve"]], settings["update_every"]
    return [
        Update(step, target, settings["drop_fraction"] * share(step / last))
        for step in range(first + every, last, every)
    ]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The facts of a schedule. Nobody else asks a schedule for its name."""

    about: str
    """For a help."""
    planner: Planner | None = None
    """Plans the updates of masks within one training; None where there are none."""
    settings: tuple[str, ...] = ()
    """Those of `tune_sparse.config.ScheduleSettings` that it reads: part of the identity of its runs."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Its values of settings that are unset."""
    starts_dense: bool = False
    """Its training begins with every weight."""
    in_levels: bool = False
    """A training of it is a chain of levels, each of them a run that begins from the one before."""
    grows: str | None = None
    """By what dropped weights are replaced: "random", or the dense "gradient"; None if they are not."""
    cerebras_algorithm: str = "static"
    """That of `cerebras_pytorch.sparse` which changes masks so in one training."""

    def read(self, settings: Any) -> dict[str, Any]:
        """The settings that it reads of a `ScheduleSettings`, its own defaults in place of those that are unset."""
        given = {name: getattr(settings, name) for name in self.settings}
        return {name: self.defaults.get(name) if value is None else value for name, value in given.items()}

    def plan(self, settings: Any, target: float, steps: int) -> list[Update]:
        """The updates of masks in one training of so many steps, by a `ScheduleSettings`."""
        return self.planner(self.read(settings), target, steps) if self.planner else []

    def levels(self, settings: Any, target: float, steps: int) -> list[Level]:
        """The levels of a chain below `target`, closed by it, each with `steps_per_level` steps or its part of `steps`.

        What cannot be divided goes to the first levels, one step each, so that each level but the last is also the
        last one of a chain that ends with it.
        """
        if not self.in_levels or not target:
            return []
        read = self.read(settings)
        sparsities = (*(level for level in read["levels"] if level < target), target)
        if read["steps_per_level"] is not None:
            return [Level(sparsity, read["steps_per_level"]) for sparsity in sparsities]
        share, more = divmod(steps, len(sparsities))
        return [Level(sparsity, share + (number < more)) for number, sparsity in enumerate(sparsities)]


def mean_sparsity(first: float, updates: Sequence[Update], steps: int) -> float:
    """Over the steps of a training, of masks that begin at one sparsity: an update counts from the step after it."""
    edges = [0, *(update.step for update in updates), steps]
    levels = [first, *(update.sparsity for update in updates)]
    return sum(level * (end - start) for level, (start, end) in zip(levels, pairwise(edges), strict=True)) / steps


REGROWING = ("update_from", "update_to", "update_every", "drop_fraction", "drop_curve")
REGROWING_DEFAULTS = {"update_from": 0.0, "update_to": 0.75}
SCHEDULES = {
    ONE_SHOT: Schedule(about="masks are made before the training and stay"),
    "gradual": Schedule(
        about="the training begins with every weight, and step by step more of the smallest are pruned (GMP: gradual "
        "magnitude pruning)",
        planner=gradual_updates,
        settings=("update_from", "update_to", "gradual_updates", "gradual_curve", "revivable"),
        defaults={"update_from": 0.15, "update_to": 0.85},
        starts_dense=True,
        cerebras_algorithm="gmp",
    ),
    ITERATIVE: Schedule(
        about="level after level: the weights as they are by then are pruned further, then tuned",
        settings=("levels", "steps_per_level", "rescore", "restart_learning_rate"),
        defaults={"levels": LEVELS},
        in_levels=True,
    ),
    "set": Schedule(
        about="at one sparsity, beginning with the masks of the method, the smallest weights are dropped and as many "
        "others grown at random (SET: sparse evolutionary training)",
        planner=regrowing_updates,
        settings=REGROWING,
        defaults=REGROWING_DEFAULTS,
        grows="random",
        cerebras_algorithm="set",
    ),
    "rigl": Schedule(
        about="as set, but those of the largest gradient are grown (RigL: rigging the lottery)",
        planner=regrowing_updates,
        settings=REGROWING,
        defaults=REGROWING_DEFAULTS,
        grows="gradient",
        cerebras_algorithm="rigl",
    ),
}
