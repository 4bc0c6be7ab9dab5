"""A plan of a search over trainings: every corner of its space checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tune_sparse.config import SweepConfig
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import InputError
from tune_sparse.identity import hash_json
from tune_sparse.ledger.run import Run
from tune_sparse.search.tuning_config import TuneConfig
from tune_sparse.search.tuning_space import Point
from tune_sparse.sweep.plan import Plan, make_plan, plan_cells
from tune_sparse.sweep.preparation import prepare


@dataclass(frozen=True)
class TunePlan:
    """A search that was found sound."""

    config: TuneConfig
    corners: Plan

    def run_at(self, point: Point) -> Run:
        """The run of a point, which any sweep of these settings has. Raises `InputError` where they do not go
        together."""
        config = self.config.sweep_at(point)
        [run] = plan_cells(config, self.corners.examples).runs.values()
        return run

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what is suggested: the identity of the search, but for the runs themselves."""
        config, stopping = self.config, self.config.sweep.early_stopping
        return {
            "space": [asdict(dimension) for dimension in config.space],
            "sampler": config.sampler,
            "objectives": list(config.objectives),
            "early_stopping": asdict(stopping) if stopping.stop_early else None,
        }

    @property
    def tune_id(self) -> str:
        run = next(iter(self.corners.runs.values()))
        identity = hash_json([sorted(self.corners.runs), self.settings])
        return f"{run.cell.model}_{run.cell.task}_{self.config.sampler}_{identity[:8]}"


def plan_tuning(config: TuneConfig) -> TunePlan:
    """Check everything that would stop a search later. Raises `InputError`."""
    return _plan(config, make_plan)


def prepare_tuning(config: TuneConfig) -> TunePlan:
    """Plan a search and make it ready to run, as `prepare` does a sweep."""
    return _plan(config, prepare)


def _plan(config: TuneConfig, plan: Callable[[SweepConfig], Plan]) -> TunePlan:
    corners = plan(config.corners())
    for run in corners.runs.values():
        config.sweep.early_stopping.rung_steps(run.protocol.steps)
    tasks = tasks_named(config.sweep.tasks[0])
    if config.sweep.early_stopping.stop_early == "accuracy" and not all(isinstance(t, PromptTask) for t in tasks):
        raise InputError("stop_early accuracy needs a task with questions, this one is text. Give loss.")
    return TunePlan(config, corners)
