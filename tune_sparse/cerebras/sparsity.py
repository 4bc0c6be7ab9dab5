"""A schedule as Model Zoo's Trainer follows it: its section `sparsity`, and exact counts beside it.

The section alone keeps int((1 - sparsity) * weights) of a matrix, computed in float32, which knows no odd number above
2**24. So what an update keeps goes beside it, counted as in trainings here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tune_sparse.config import ScheduleSettings
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.mask_updates import counts_by_shape, drop_count
from tune_sparse.pruning.methods import METHODS
from tune_sparse.schedules import SCHEDULES, Schedule, Update


def sparsity_section(
    schedule: Schedule, settings: ScheduleSettings, target: float, steps: int, names: Collection[str] = ()
) -> dict[str, Any]:
    """The section `sparsity` of Model Zoo's Trainer for one training of so many steps.

    names: of the matrices there, without which its own filter would prune every matrix of the model. Masks begin where
    weights are 0, but for GMP, whose training begins with every weight.
    """
    only = {"param_filter": sorted(f"model.{name}" for name in names)} if names else {}
    updates, read = schedule.plan(settings, target, steps), schedule.read(settings)
    section: dict[str, Any] = {"algorithm": schedule.cerebras_algorithm}
    if schedule.starts_dense:
        section |= {"sparsity": {"type": "cycling", "values": [update.sparsity for update in updates]}}
        return section | {"update": {"steps": [update.step for update in updates]}} | only
    section |= {"init_method": "from_zeros", "sparsity": target}
    if not updates:
        return section | only
    start, stop = (int(read[name] * steps) for name in ("update_from", "update_to"))
    every, drop = read["update_every"], read["drop_fraction"]
    falling = {"type": "cosine", "init": drop, "half_period": stop}
    # An update at step 0 makes masks begin as init_method says; there is none, as steps count from 1.
    update = {"freq": every, "start": start + every if start else 0, "stop": stop}
    return section | {"drop_fraction": falling if read["drop_curve"] == "cosine" else drop, "update": update} | only


@dataclass(frozen=True)
class ChangingMasks:
    """A schedule that changes masks in one training, as it is a part of a graph: its numbers are constants there."""

    section: str
    """that of Model Zoo, as JSON"""
    updates: tuple[Update, ...]
    allocation: str
    """by which weights are cut"""
    target: float
    is_cut: bool
    """Weights go without others in their place."""

    @classmethod
    def from_run(cls, run: Run) -> ChangingMasks | None:
        """None where masks stay."""
        if not run.updates:
            return None
        schedule, target = SCHEDULES[run.cell.schedule], run.cell.sparsity
        section = sparsity_section(schedule, run.schedule_settings, target, run.protocol.steps)
        allocation = METHODS[run.cell.method].allocation if run.is_pruned else "uniform"
        return cls(json.dumps(section), tuple(run.updates), allocation, target, schedule.grows is None)

    @property
    def algorithm(self) -> str:
        return str(json.loads(self.section)["algorithm"])

    def counts(self, shapes: Mapping[str, Sequence[int]], kept: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
        """{"survivors": weights that are kept before and after each update, "kept": after it}, each by matrix.

        kept: at the start of the training.
        """
        sizes = {name: prod(shape) for name, shape in shapes.items()}
        if self.is_cut:
            pruned = [counts_by_shape(self.allocation, shapes, update.sparsity) for update in self.updates]
            cut = {name: [size - counts[name] for counts in pruned] for name, size in sizes.items()}
            return {"survivors": cut, "kept": cut}
        fractions = [update.drop_fraction for update in self.updates]
        survivors = {n: [kept[n] - drop_count(size, kept[n], part) for part in fractions] for n, size in sizes.items()}
        return {"survivors": survivors, "kept": {name: [kept[name]] * len(fractions) for name in sizes}}

    def counts_at_target(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, list[int]]]:
        """The counts of a model that is not pruned yet, as if by shapes alone."""
        by_shape = self.allocation if self.allocation == "erk" else "uniform"
        pruned = counts_by_shape(by_shape, shapes, self.target)
        return self.counts(shapes, {name: prod(shape) - pruned[name] for name, shape in shapes.items()})

    def job(self, counts: Mapping[str, Mapping[str, list[int]]]) -> dict[str, Any]:
        """What the program there is told. counts: by names of Model Zoo."""
        return {"section": json.loads(self.section), "steps": [update.step for update in self.updates], **counts}
