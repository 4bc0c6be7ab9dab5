"""What a dry run says of schedules before anything trains."""

from __future__ import annotations

from dataclasses import asdict

from tune_sparse.config import SweepConfig
from tune_sparse.sweep.planned_updates import planned_lines, planned_updates


def test_the_updates_of_each_schedule_are_said_once_for_what_is_alike() -> None:
    names = {"preset": "dst", "sparsities": (0.0, 0.5, 0.9), "gradual_updates": 4}
    assert planned_lines(planned_updates(SweepConfig.from_names(names))) == [
        "Updates of masks in each training:",
        "  gradual at 0.5: 4 updates, after steps 22 35 47 59, to sparsities 0.125 0.25 0.375 0.5",
        "  gradual at 0.9: 4 updates, after steps 22 35 47 59, to sparsities 0.225 0.45 0.675 0.9",
        *(
            f"  {name} at 0.5 0.9: 10 updates, after steps 5 10 15 ... 45 50, dropping 0.29 0.27 0.24 ... 0.013 0.0011 "
            "of the kept weights"
            for name in ("set", "rigl")
        ),
    ]


def test_nothing_is_said_where_masks_stay() -> None:
    assert planned_lines(planned_updates(SweepConfig(models=("tiny-llama",)))) == []


def test_a_dry_run_has_every_update_for_a_program() -> None:
    config = SweepConfig.from_names({"preset": "dst", "schedules": "one-shot gradual", "sparsities": "0.5"})
    [planned] = planned_updates(config)
    assert (planned.schedule, planned.sparsity, len(planned.updates)) == ("gradual", 0.5, 10)
    assert asdict(planned)["updates"][-1] == {"step": 59, "sparsity": 0.5, "drop_fraction": 0.0}
