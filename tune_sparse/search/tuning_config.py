"""Settings of a search over whole trainings: its space, its objectives, and how it is searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tune_sparse.config import FLOPS_TOKENS, EarlyStopping, Protocol, ScheduleSettings, SweepConfig
from tune_sparse.config.axes import own_settings
from tune_sparse.config.options import option, rule
from tune_sparse.errors import unknown_name
from tune_sparse.search.tuning_space import CELL, Dimension, Point

SAMPLERS = {
    "tpe": "Bayesian optimisation by Tree-structured Parzen Estimators",
    "nsga2": "genetic algorithm for several objectives",
    "random": "independent random trials",
}


@dataclass(frozen=True)
class Objective:
    """One aim of a search, read from the metrics of a finished run; none of them looks at test examples."""

    about: str
    mode: str
    """min or max"""
    value: Callable[[Mapping[str, Any]], float]


OBJECTIVES = {
    "loss": Objective("on the selection examples, of the scored model", "min", lambda found: found["eval_loss"]),
    "sparsity": Objective("as high as possible", "max", lambda found: found["actual_sparsity"]),
    "inference_flops": Objective(
        "arithmetic operations of the sparse model, as few as possible",
        "min",
        lambda found: found["inference_flops"][str(FLOPS_TOKENS)],
    ),
}


@dataclass(frozen=True)
class TuneConfig:
    """A search of settings for one model, task and seed; the rest of the cell is one value each, or searched."""

    sweep: SweepConfig
    space: tuple[Dimension, ...]
    sampler: str = option("search algorithm", "tpe", metavar="NAME", choices=SAMPLERS)
    trials: int = option("number of settings that are tried; more of them continue an earlier search", 30, metavar="N")
    objectives: tuple[str, ...] = option(
        "aims of the search: loss, alone or with one of the others",
        ("loss",),
        metavar="NAME",
        choices={name: objective.about for name, objective in OBJECTIVES.items()},
    )

    def __post_init__(self) -> None:
        searched = {CELL[d.name] for d in self.space if d.name in CELL}
        for axis in ("models", "tasks", "methods", "sparsities", "modes", "schedules", "seeds"):
            values = getattr(self.sweep, axis)
            rule(
                axis in searched or len(values) == 1,
                f"a search tries settings of one cell, so {axis} must name one value",
                values,
                "Name one, or search it with --space." if axis in CELL.values() else "Name one.",
            )
        rule(self.sweep.backend == ("torch",), "a search trains with torch", self.sweep.backend, "Leave backend out.")
        rule(not self.sweep.axes, "a search has no axes", self.sweep.axes, "Put them into --space.")
        if self.sampler not in SAMPLERS:
            raise unknown_name("sampler", self.sampler, SAMPLERS)
        rule(self.trials >= 1, "trials must be at least 1", self.trials, "Give a larger number.")
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                raise unknown_name("objective", objective, OBJECTIVES)
        rule(
            self.objectives[:1] == ("loss",) and len(self.objectives) <= 2 and self.objectives[1:] != ("loss",),
            "objectives are loss, and at most one other after it",
            self.objectives,
            "Write loss sparsity, say.",
        )

    def settings_at(self, point: Point) -> Point:
        """With the end of the learning rate's decay, which keeps its share of the rate if only that is searched."""
        if "learning_rate" not in point or "final_learning_rate" in point:
            return point
        protocol = self.sweep.protocol
        share = protocol.final_learning_rate / protocol.learning_rate
        return point | {"final_learning_rate": point["learning_rate"] * share}

    def sweep_at(self, point: Point) -> SweepConfig:
        """The sweep of the one training at a point. Raises `InputError` for settings that do not go together."""
        cell: dict[str, Any] = {CELL[name]: (value,) for name, value in point.items() if name in CELL}
        settings = tuple((name, value) for name, value in self.settings_at(point).items() if name not in CELL)
        protocol = replace(self.sweep.protocol, **own_settings(Protocol, settings))
        self.sweep.early_stopping.rung_steps(protocol.steps)
        schedule = replace(self.sweep.schedule_settings, **own_settings(ScheduleSettings, settings))
        own: dict[str, Any] = {"protocol": protocol, "schedule_settings": schedule, "early_stopping": EarlyStopping()}
        return replace(self.sweep, **cell, **own)

    def corners(self) -> SweepConfig:
        """The sweep over all combinations of the corners of the space: what is checked before a search."""
        searched = {d.name: d.corners for d in self.space}
        cell: dict[str, Any] = {CELL[name]: values for name, values in searched.items() if name in CELL}
        axes = {name: values for name, values in searched.items() if name not in CELL}
        if "learning_rate" in axes and "final_learning_rate" not in axes:
            rates = (self.settings_at({"learning_rate": rate}) for rate in axes.pop("learning_rate"))
            axes["learning_rate:final_learning_rate"] = tuple(tuple(pair.values()) for pair in rates)
        return replace(self.sweep, **cell, axes=axes, early_stopping=EarlyStopping())
