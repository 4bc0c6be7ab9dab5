"""The rules of schedules and their settings: what breaks one is refused before anything trains."""

from __future__ import annotations

from typing import Any

import pytest

from tune_sparse.config import Protocol, ScheduleSettings, SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.pruning.methods import check_schedule

BROKEN_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"update_from": -0.1}, r"update_from must be a fraction of the steps, got -0\.1\."),
    ({"update_to": 85.0}, r"update_to must be a fraction of the steps, got 85\.0\."),
    ({"gradual_updates": 0}, r"gradual_updates must be at least 1, got 0\."),
    ({"update_every": 0}, r"update_every must be at least 1, got 0\."),
    ({"steps_per_level": 0}, r"steps_per_level must be at least 1, got 0\."),
    *(({"drop_fraction": drop}, rf"in \(0, 1\), got {drop}\. Give one such as") for drop in (0.0, 1.0, -0.3, 30.0)),
    ({"levels": (0.5, 1.0)}, r"levels are sparsities in \(0, 1\), got \(0\.5, 1\.0\)\."),
    ({"levels": (0.0, 0.5)}, r"levels are sparsities in \(0, 1\)"),
    ({"levels": (0.5, 0.3)}, r"levels must rise, as what is pruned stays pruned, got \(0\.5, 0\.3\)\. Sort them"),
    ({"levels": (0.3, 0.3)}, r"levels must rise"),
    ({"gradual_curve": "quadratic"}, r"unknown gradual_curve 'quadratic'\..* Known: cubic, exponential, linear\."),
    ({"drop_curve": "cosin"}, r"unknown drop_curve 'cosin'\. Did you mean 'cosine'"),
]
BROKEN_SWEEPS: list[tuple[dict[str, Any], str]] = [
    ({"schedules": ("gradul",)}, r"unknown schedule 'gradul'\. Did you mean 'gradual'"),
    (
        {"schedules": ("one-shot", "rigl"), "modes": ("masked-finetuning", "sparse-to-dense")},
        r"the mode sparse-to-dense trains LoRA on fixed masks, so its only schedule is one-shot, got 'rigl'\. Give",
    ),
    ({"schedules": ("set",), "modes": ("dense",), "sparsities": (0.0,)}, r"the mode dense trains LoRA .* got 'set'"),
    ({"schedules": ("set",)}, r"set must update masks at least 3 times in the 200 steps of a training, got 1\. Raise"),
    ({"schedules": ("gradual",), "steps": 4}, r"gradual must update masks at least 3 times in the 4 steps .* got 2\."),
    ({"schedules": ("gradual",), "gradual_updates": 2}, r"got 2\. Raise steps, raise gradual_updates, or raise upd"),
    ({"schedules": ("rigl",), "update_every": 60}, r"got 2\. Raise steps, lower update_every, or raise update_to\."),
    (
        {"schedules": ("gradual",), "update_to": 0.1},
        r"the updates of gradual must end after they begin, at update_from = 0\.15, got 0\.1\. Raise update_to\.",
    ),
    ({"schedules": ("rigl",), "update_from": 0.9, "update_every": 1}, r"at update_from = 0\.9, got 0\.75"),
    ({"schedules": ("iterative",), "levels": (0.3, 0.95)}, r"below the largest sparsity .*, 0\.9, got \[0\.95\]"),
    ({"update_every": 5}, r"the setting update_every is read by set and rigl alone, .* got \['one-shot'\]\. Leave"),
    ({"schedules": ("gradual",), "levels": (0.3,)}, r"levels is read by iterative alone, .* got \['gradual'\]"),
    ({"modes": ("sparse-to-dense",), "dynamics_every": 5}, r"dynamics_every is read by masked-finetuning alone"),
    ({"schedules": ("gradual",), "recover": "reconstruct"}, r"gradual begins with all of them, got 'reconstruct'\."),
    (
        {"schedules": ("gradual",), "backend": "cerebras", "revivable": True},
        r"cerebras prunes weights in place, .*: revivable must be false with it, got True\. Leave it out, or train on",
    ),
    (
        {"schedules": ("iterative",), "backend": "cerebras", "restart_learning_rate": False},
        r"the backend cerebras begins .* anew: restart_learning_rate must be true with it, got False\.",
    ),
]


@pytest.mark.parametrize(("values", "message"), BROKEN_SETTINGS, ids=lambda case: str(case)[:60])
def test_a_broken_setting_is_refused_with_rule_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScheduleSettings(**values)


@pytest.mark.parametrize(("names", "message"), BROKEN_SWEEPS, ids=lambda case: str(case)[:60])
def test_a_schedule_that_a_sweep_cannot_follow_is_refused(names: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SweepConfig.from_names({"models": "my-llama", "modes": "masked-finetuning"} | names)


def test_settings_of_schedules_have_flat_names() -> None:
    names = {"schedules": "rigl iterative", "update_every": "20", "levels": "0.2 0.4", "update_to": "none"}
    config = SweepConfig.from_names({"models": "my-llama", "modes": "masked-finetuning"} | names)
    assert config.schedules == ("rigl", "iterative")
    assert config.schedule_settings == ScheduleSettings(update_every=20, levels=(0.2, 0.4))


def test_a_preset_may_set_more_than_the_schedules_left_of_it_read() -> None:
    config = SweepConfig.from_names({"preset": "dst", "schedules": "one-shot"})
    assert config.schedules == ("one-shot",)


def test_without_a_schedule_few_steps_are_enough() -> None:
    assert SweepConfig(models=("my-llama",), protocol=Protocol(steps=1, warmup_fraction=0)).schedules == ("one-shot",)


@pytest.mark.parametrize(
    ("method", "schedule", "why"),
    [
        ("structured", "set", "single weights, so that masks would not stay structured"),
        ("wanda-2:4", "rigl", "single weights, so that masks would not stay 2:4"),
        ("structured", "gradual", "single weights, so that masks would not stay structured"),
        ("magnitude-2:4", "gradual", "2:4 has one sparsity, and there are others on the way"),
        ("sparsegpt-4:8", "iterative", "4:8 has one sparsity, and there are others on the way"),
        ("wanda", "gradual", "only magnitude can score them"),
        ("random", "gradual", "only magnitude can score them"),
        ("magnitude-owl", "gradual", "only magnitude can score them"),
    ],
)
def test_a_method_whose_masks_a_schedule_cannot_make_or_keep_is_refused(method: str, schedule: str, why: str) -> None:
    with pytest.raises(InputError, match=rf"got '{method}' with '{schedule}': .*{why}\. Sweep one without the other"):
        check_schedule(method, schedule)


@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        ("structured", "iterative"),
        ("sparsegpt", "iterative"),
        ("wanda", "rigl"),
        ("random", "set"),
        ("unstructured", "gradual"),
        ("magnitude-global", "gradual"),
        ("wanda-2:4", "one-shot"),
    ],
)
def test_other_methods_go_with_a_schedule(method: str, schedule: str) -> None:
    check_schedule(method, schedule)


def test_a_setting_on_an_axis_is_checked_at_its_values_not_at_its_default() -> None:
    asked = {"models": "tiny-llama", "sparsities": 0.5, "modes": "masked-finetuning", "schedules": "rigl", "steps": 100}
    swept = SweepConfig.from_names(asked | {"axes": {"update_every": "10,20"}})
    assert [swept.schedule_settings_at(point).update_every for point in swept.points] == [10, 20]
    with pytest.raises(InputError, match="at update_every=40: rigl must update masks at least 3 times"):
        SweepConfig.from_names(asked | {"axes": {"update_every": "10,40"}})


def test_on_cerebras_no_update_compares_the_weights_of_a_whole_model() -> None:
    check_schedule("magnitude-global", "rigl", ("cerebras",))
    check_schedule("magnitude-erk", "gradual", ("cerebras",))
    with pytest.raises(InputError, match="an update knows one matrix alone"):
        check_schedule("magnitude-global", "gradual", ("torch", "cerebras"))
