"""Settings of a search: one cell to adapt, the space of its sub-adapters, and how they are searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tune_sparse.config import SweepConfig
from tune_sparse.config.options import option, rule
from tune_sparse.errors import InputError, unknown_name
from tune_sparse.lora.rank_space import SAMPLINGS, Space, SuperAdapter
from tune_sparse.modes import MODES

SAMPLERS = {
    "nsga2": "genetic algorithm for several objectives",
    "tpe": "Bayesian optimisation by Tree-structured Parzen Estimators",
    "hill-climbing": "small changes of the best candidates so far",
    "random": "independent random candidates",
}
OBJECTIVES = {
    "accuracy": "on the selection examples, as high as possible",
    "parameters": "number of weights of the adapters, as low as possible",
    "inference_flops": "arithmetic operations of the model with its adapters, as low as possible",
}
CELL_AXES = ("models", "tasks", "methods", "sparsities", "modes", "seeds")
"""The axes of a sweep that name its cells: a search has one value of each."""


@dataclass(frozen=True)
class SearchConfig:
    """A search of sub-adapters for one model, task, method, sparsity, mode and seed: the only cell of `sweep`."""

    sweep: SweepConfig
    space: Space
    space_name: str = option("name of the space", "custom")
    sampling: str = option(
        "how the ranks of each training step are drawn",
        "uniform",
        metavar="NAME",
        choices=SAMPLINGS,
    )
    sampler: str = option(
        "search algorithm",
        "nsga2",
        metavar="NAME",
        choices=SAMPLERS,
    )
    trials: int = option("number of trials of the search; each scores another candidate", 100, metavar="N")
    objectives: tuple[str, ...] = option(
        "aims of the search: accuracy, alone or with one of the other two",
        ("accuracy", "parameters"),
        metavar="NAME",
        choices=OBJECTIVES,
    )
    is_racing: bool = option("stop a candidate early when another is ahead by a lenient rule", True)
    in_order: bool = option("score one candidate after the other, so that the same seed repeats the search", False)

    def __post_init__(self) -> None:
        for axis in CELL_AXES:
            values = getattr(self.sweep, axis)
            rule(len(values) == 1, f"a search adapts one cell, so {axis} must name one", values, "Search one by one.")
        rule(not self.sweep.axes, "a search trains one cell, so it has no axes", self.sweep.axes, "Leave them out.")
        [mode] = self.sweep.modes
        if not MODES[mode].has_adapter:
            raise InputError(f"a search slices adapters, and the mode {mode} trains none. Choose sparse-to-sparse.")
        rule(
            self.sweep.backend == ("torch",),
            "a search slices adapters where it scores them, so its backend must be torch",
            self.sweep.backend,
            "Leave it out.",
        )
        if self.sampler not in SAMPLERS:
            raise unknown_name("sampler", self.sampler, SAMPLERS)
        if self.sampling not in SAMPLINGS:
            raise unknown_name("sampling", self.sampling, SAMPLINGS)
        rule(self.trials >= 1, "trials must be at least 1", self.trials, "Give a larger number.")
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                raise unknown_name("objective", objective, OBJECTIVES)
        rule(
            self.objectives[:1] == ("accuracy",) and len(self.objectives) <= 2 and self.objectives[1:] != ("accuracy",),
            "objectives are accuracy, and at most one cost after it",
            self.objectives,
            "Write accuracy parameters, say.",
        )

    @property
    def minimises_cost(self) -> bool:
        return len(self.objectives) == 2

    @property
    def super_adapter(self) -> SuperAdapter:
        return SuperAdapter(self.space, self.sampling)

    def candidate_settings(self) -> dict[str, Any]:
        """The settings that decide which candidates are suggested: part of a search's identity."""
        order = {"in_order": True} if self.in_order else {}
        return {"sampler": self.sampler, "objectives": list(self.objectives), "is_racing": self.is_racing} | order
