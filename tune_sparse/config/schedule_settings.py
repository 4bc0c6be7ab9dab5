"""When and how masks change while a model trains."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from tune_sparse.config.options import option, rule
from tune_sparse.config.protocol import Protocol
from tune_sparse.errors import unknown_name
from tune_sparse.modes import MODES
from tune_sparse.schedules import LEVELS, MIN_UPDATES, ONE_SHOT, SCHEDULES

CURVES = {
    "linear": "by the same amount each time",
    "cubic": "fast at first",
    "exponential": "each time the same fraction of the kept weights is pruned",
}
DROP_CURVES = {"cosine": "falls to 0 towards the last update", "constant": "stays"}


@dataclass(frozen=True)
class ScheduleSettings:
    """How a schedule changes masks. Each schedule reads some of them, which are part of its runs' identity."""

    update_from: float | None = option(
        "gradual, set, rigl: fraction of the steps before which no mask changes",
        None,
        unset="so 0.15 for gradual and 0 for set and rigl",
        heading="schedules",
    )
    update_to: float | None = option(
        "gradual, set, rigl: fraction of the steps after which no mask changes",
        None,
        unset="so 0.85 for gradual and 0.75 for set and rigl",
    )
    gradual_updates: int = option(
        "gradual: number of updates of the masks, or of steps between the two fractions if they are fewer", 10
    )
    gradual_curve: str = option("gradual: how the sparsity rises to that of the cell", "linear", choices=CURVES)
    revivable: bool = option(
        "gradual: pruned weights are trained on below their mask and may come back with the next update", False
    )
    update_every: int = option("set, rigl: steps from one update of the masks to the next", 100)
    drop_fraction: float = option("set, rigl: fraction of the kept weights that the first updates drop", 0.3)
    drop_curve: str = option("set, rigl: how that fraction goes on", "cosine", choices=DROP_CURVES)
    levels: tuple[float, ...] | None = option(
        "iterative: rising sparsities on the way, of which a cell takes those below its own",
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
    dynamics_every: int = option(
        "masked-finetuning: steps between two records of the masks, besides one at each update", 100
    )
    effective_rank_side: int = option(
        "masked-finetuning: longest side of matrices whose effective rank each update records, by SVD; 0 for none", 0
    )

    def __post_init__(self) -> None:
        for name in ("update_from", "update_to"):
            value = getattr(self, name)
            rule(value is None or 0 <= value <= 1, f"{name} must be a fraction of the steps", value, "Give one.")
        for name in ("gradual_updates", "update_every", "steps_per_level", "dynamics_every"):
            value = getattr(self, name)
            rule(value is None or value >= 1, f"{name} must be at least 1", value, "Give a larger number.")
        side = self.effective_rank_side
        rule(side >= 0, "effective_rank_side must not be negative", side, "Give 0, or a number of rows or columns.")
        drop = self.drop_fraction
        rule(0 < drop < 1, "drop_fraction is the fraction of kept weights, in (0, 1)", drop, "Give one such as 0.3.")
        levels = self.levels or ()
        rule(all(0 < level < 1 for level in levels), "levels are sparsities in (0, 1)", levels, "Give fractions.")
        rising = all(low < high for low, high in pairwise(levels))
        rule(rising, "levels must rise, as what is pruned stays pruned", levels, "Sort them, each once.")
        for name, choices in (("gradual_curve", CURVES), ("drop_curve", DROP_CURVES)):
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)


def check_schedules(
    schedules: Sequence[str],
    settings: ScheduleSettings,
    modes: Sequence[str],
    sparsities: Sequence[float],
    protocol: Protocol,
) -> None:
    """Raise `InputError` for a schedule that no table has, that a mode cannot follow, or that changes too little in
    the trainings of a protocol."""
    for schedule, mode in product(schedules, modes):
        if schedule not in SCHEDULES:
            raise unknown_name("schedule", schedule, SCHEDULES)
        rule(
            schedule == ONE_SHOT or not MODES[mode].has_adapter,
            f"the mode {mode} trains LoRA on fixed masks, so its only schedule is {ONE_SHOT}",
            schedule,
            "Give --modes masked-finetuning, or leave the schedule out.",
        )
    for schedule in schedules:
        rule(
            protocol.recover == "none" or not SCHEDULES[schedule].starts_dense,
            f"recover is for weights that are pruned before the training, and {schedule} begins with all of them",
            protocol.recover,
            "Leave recover out, or the schedule.",
        )
        _check_updates(schedule, settings, protocol.steps)
    above = [level for level in settings.levels or () if level >= max(sparsities)]
    rule(not above, f"levels lie below the largest sparsity of the sweep, {max(sparsities):g}", above, "Leave it out.")


def check_on_cerebras(schedules: Sequence[str], settings: ScheduleSettings) -> None:
    """Raise `InputError` for a setting that a training on Cerebras cannot follow as one here does."""
    refused = {
        "revivable": (False, "prunes weights in place, so that none is trained on below its mask"),
        "restart_learning_rate": (True, "begins the learning rate of each training anew"),
    }
    for name, (needed, reason) in refused.items():
        is_read = any(name in SCHEDULES[schedule].settings for schedule in schedules)
        rule(
            not is_read or getattr(settings, name) is needed,
            f"the backend cerebras {reason}: {name} must be {str(needed).lower()} with it",
            getattr(settings, name),
            "Leave it out, or train on torch.",
        )


def _check_updates(schedule: str, settings: ScheduleSettings, steps: int) -> None:
    facts = SCHEDULES[schedule]
    if facts.planner is None:
        return
    read = facts.read(settings)
    rule(
        read["update_from"] < read["update_to"],
        f"the updates of {schedule} must end after they begin, at update_from = {read['update_from']:g}",
        read["update_to"],
        "Raise update_to.",
    )
    count = len(facts.plan(settings, 0.5, steps))
    more = [name for name in ("gradual_updates", "update_every") if name in facts.settings]
    rule(
        count >= MIN_UPDATES,
        f"{schedule} must update masks at least {MIN_UPDATES} times in the {steps} steps of a training",
        count,
        f"Raise steps, {'lower' if more == ['update_every'] else 'raise'} {more[0]}, or raise update_to.",
    )


def check_are_read(names: Iterable[str], schedules: Collection[str], modes: Collection[str]) -> None:
    """Raise `InputError` for a setting of schedules that was given though nothing in the sweep reads it."""
    read = {name for schedule in schedules if schedule in SCHEDULES for name in SCHEDULES[schedule].settings}
    if any(not MODES[mode].has_adapter for mode in modes):
        read |= {"dynamics_every", "effective_rank_side"}
    for name in names:
        readers = [schedule for schedule, facts in SCHEDULES.items() if name in facts.settings]
        without_adapter = [mode for mode, facts in MODES.items() if not facts.has_adapter]
        rule(
            name in read,
            f"the setting {name} is read by {' and '.join(readers or without_adapter)} alone, and a sweep has no "
            "settings that nothing reads",
            list(schedules) if readers else list(modes),
            "Leave it out, or sweep what reads it.",
        )
