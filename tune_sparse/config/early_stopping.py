"""Early stopping: trainings that do worse than others of their cell end at a rung (ASHA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune_sparse.config.options import option, rule
from tune_sparse.errors import InputError, unknown_name
from tune_sparse.schedules import ITERATIVE

if TYPE_CHECKING:
    from tune_sparse.config import SweepConfig

JUDGES = {
    "loss": "their loss on the selection examples",
    "accuracy": "their accuracy on the selection examples, which takes longer",
}


@dataclass(frozen=True)
class EarlyStopping:
    """Asynchronous successive halving (ASHA: Li et al. 2018, arXiv:1810.05934). No part of a run's identity: a rung is
    a prefix of the whole training, so one that is never stopped has the numbers that it has without rungs."""

    stop_early: str | None = option(
        "end trainings before their last step, by ASHA, that do worse than others of their cell with other settings. "
        "They are judged by",
        None,
        metavar="BY",
        unset="so every training runs to its end",
        choices=JUDGES,
    )
    rungs: tuple[float, ...] | None = option(
        "with --stop-early: fractions of the steps at which trainings are judged, such as 1/4 1/2",
        None,
        metavar="FRACTION",
        unset="one part in REDUCTION squared, and one in REDUCTION",
    )
    reduction: int = option(
        "with --stop-early: one training in so many goes on after a rung, among those that came there before it",
        3,
        metavar="N",
    )

    def __post_init__(self) -> None:
        if self.stop_early is not None and self.stop_early not in JUDGES:
            raise unknown_name("stop_early", self.stop_early, JUDGES)
        rule(self.reduction >= 2, "reduction must be at least 2, or none would be stopped", self.reduction, "Raise it.")
        if self.rungs is None:
            return
        rule(len(self.rungs) > 0, "rungs must name at least one before the end", self.rungs, "Give 1/4 1/2, say.")
        rule(
            all(0 < rung < 1 for rung in self.rungs),
            "a rung is a fraction of the steps, above 0 and below 1: the end of a training is no rung",
            self.rungs,
            "Give 1/4 1/2, say.",
        )
        rule(
            list(self.rungs) == sorted(set(self.rungs)), "rungs must rise", self.rungs, "Put them in order, each once."
        )

    @property
    def fractions(self) -> tuple[float, ...]:
        return self.rungs or (1 / self.reduction**2, 1 / self.reduction)

    def rung_steps(self, steps: int) -> tuple[int, ...]:
        """The steps after which a training of so many steps is judged. Raises `InputError` if two rungs coincide."""
        found = tuple(round(fraction * steps) for fraction in self.fractions)
        if len({0, *found, steps}) < len(found) + 2:
            raise InputError(
                f"rungs must be different steps between the first and the last, got {list(found)} of a training of "
                f"{steps} steps. Raise steps, or give fewer or other rungs."
            )
        return found


def check_early_stopping(config: SweepConfig) -> None:
    """Raise `InputError` for trainings that cannot be judged at rungs, of a sweep that stops early."""
    rule(
        "cerebras" not in config.backends,
        "stop_early judges trainings at rungs, and those of the backend cerebras are measured only at their end",
        config.backend,
        "Leave stop_early out, or sweep the backend torch alone.",
    )
    rule(
        ITERATIVE not in config.schedules,
        f"a level of the schedule {ITERATIVE} needs the end of the one before it, which stop_early may never reach",
        config.schedules,
        "Leave stop_early out, or sweep the other schedules apart.",
    )
    if not config.axes:  # or else each of its points says how many steps
        config.early_stopping.rung_steps(config.protocol.steps)
