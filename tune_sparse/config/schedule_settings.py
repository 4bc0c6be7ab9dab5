"""When and how masks change while a model trains."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from tune_sparse.config.options import option, rule
from tune_sparse.errors import unknown_name
from tune_sparse.schedules import LEVELS

CURVES = {"linear": "by the same amount each time", "cubic": "fast at first (Zhu & Gupta 2017)"}
DROP_CURVES = {"cosine": "falls to 0 at the last update", "constant": "stays"}
STARTS = {
    "method": "the mask of the pruning method, the only sensible one for pretrained weights",
    "random": "a random mask",
}


@dataclass(frozen=True)
class ScheduleSettings:
    """How a schedule changes masks. Each schedule reads some of them, which are part of its runs' identity."""

    update_from: float | None = option(
        "gradual, set, rigl: fraction of the steps before which no mask changes",
        None,
        unset="0.15 for gradual, 0 for set and rigl",
        heading="schedules",
    )
    update_to: float | None = option(
        "gradual, set, rigl: fraction of the steps after which no mask changes",
        None,
        unset="0.85 for gradual, 0.75 for set and rigl",
    )
    gradual_updates: int = option("gradual: number of updates, or of steps between the two fractions if less", 10)
    gradual_curve: str = option("gradual: how the sparsity rises", "linear", choices=CURVES)
    revivable: bool = option(
        "gradual: pruned weights are trained on below their mask and may come back with the next update", False
    )
    update_every: int = option("set, rigl: steps from one update to the next", 100)
    drop_fraction: float = option("set, rigl: fraction of the kept weights that the first updates drop", 0.3)
    drop_curve: str = option("set, rigl: what becomes of that fraction", "cosine", choices=DROP_CURVES)
    start_from: str = option("set, rigl: the first masks", "method", choices=STARTS)
    levels: tuple[float, ...] | None = option(
        "iterative: sparsities on the way, of which a cell takes those below its own",
        None,
        unset="so " + " ".join(f"{level:g}" for level in LEVELS),
    )
    steps_per_level: int | None = option(
        "iterative: optimizer steps of each level", None, unset="so `steps` are divided among the levels of a cell"
    )
    rescore: bool = option("iterative: every level is scored on the weights as they are by then", True)
    restart_learning_rate: bool = option(
        "iterative: warm-up and decay of the learning rate begin anew with each level, instead of once for all", True
    )
    dynamics_every: int = option("steps between two records of the masks, besides one at each update", 100)

    def __post_init__(self) -> None:
        levels = self.levels or ()
        is_rising = all(0 < low < high for low, high in pairwise((*levels, 1.0)))
        rule(is_rising, "levels must rise, each in (0, 1)", levels, "Sort them.")
        steps = self.steps_per_level
        rule(steps is None or steps >= 1, "steps_per_level must be at least 1 or none", steps, "Give steps.")
        for name in ("update_from", "update_to"):
            value = getattr(self, name)
            rule(value is None or 0 <= value <= 1, f"{name} must be a fraction of the steps", value, "Give one.")
        for name in ("gradual_updates", "update_every", "dynamics_every"):
            rule(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name), "Give a larger number.")
        rule(0 < self.drop_fraction < 1, "drop_fraction must be in (0, 1)", self.drop_fraction, "Give a fraction.")
        for name, choices in (("gradual_curve", CURVES), ("drop_curve", DROP_CURVES), ("start_from", STARTS)):
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)
