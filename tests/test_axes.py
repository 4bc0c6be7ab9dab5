from __future__ import annotations

from dataclasses import Field, replace
from typing import Any

import pytest
from factories import make_cell, make_run
from hypothesis import given
from hypothesis import strategies as st

from tune_sparse.config import LORA_SETTINGS, Protocol, SweepConfig
from tune_sparse.config.axes import NO_AXIS, OWNERS, axis_text
from tune_sparse.config.protocol import PUBLISHED
from tune_sparse.errors import InputError
from tune_sparse.modes import MODES
from tune_sparse.sweep.plan import check_names, distinct_trainings, requested_points, trained_points
from tune_sparse.sweep.points import at_points, reads_setting

RATES = {"learning_rate": "1e-3,3e-3,1e-2"}
ONE_CELL = {"models": "tiny-llama", "tasks": "boolq", "methods": "unstructured", "sparsities": 0.5}


def asked(axes: Any, **names: Any) -> SweepConfig:
    """As a user asks: the preset by its name, and nothing set besides."""
    return SweepConfig.from_names({"preset": "toy"} | ONE_CELL | {"axes": axes} | names)


def test_an_axis_multiplies_cells_by_its_values_and_several_by_their_combinations() -> None:
    assert asked({}).points == ((),)
    one = asked(RATES)
    assert one.axes == {"learning_rate": (1e-3, 3e-3, 1e-2)}
    assert [dict(point) for point in one.points] == [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
    assert distinct_trainings(one) == 3 * 2
    assert [point.protocol.learning_rate for point in trained_points(one)][:3] == [1e-3, 3e-3, 1e-2]
    both = asked(RATES | {"weight_decay": [0.0, 0.1]})
    assert len(both.points) == 6
    assert both.points[1] == (("learning_rate", 1e-3), ("weight_decay", 0.1))


def test_paired_settings_go_together_in_text_and_in_lists() -> None:
    text = asked({"learning_rate:final_learning_rate": "1e-4:1e-5,3e-4:3e-5"})
    lists = asked({"learning_rate:final_learning_rate": [[1e-4, 1e-5], ["3e-4", "3e-5"]]})
    assert text.points == lists.points
    assert [(p.learning_rate, p.final_learning_rate) for p in text.protocols] == [(1e-4, 1e-5), (3e-4, 3e-5)]


def test_a_value_of_several_parts_is_one_value() -> None:
    swept = asked({"train_also": ["norm", "norm bias"]})
    assert swept.axes == {"train_also": (("norm",), ("bias", "norm"))}
    assert asked({"train_also": "norm,norm bias"}).points == swept.points
    assert [axis_text("train_also", value) for value in swept.axes["train_also"]] == ["norm", "bias norm"]
    assert axis_text("learning_rate:steps", (1e-3, 70)) == "0.001:70"


@pytest.mark.parametrize("mode", MODES)
def test_a_run_at_a_point_is_the_run_of_these_settings(mode: str) -> None:
    sparsity = 0.5 if MODES[mode].is_pruned else 0.0
    names = {"modes": mode, "sparsities": sparsity, "methods": "wanda"}
    swept = asked({"learning_rate": "1e-3,1e-2"}, **names)
    alone = asked({}, learning_rate=1e-2, **names)
    [_, at_last], [set_alone] = trained_points(swept), trained_points(alone)
    assert run_of(at_last).run_id == run_of(set_alone).run_id


def run_of(point: Any) -> Any:
    return make_run(replace(point.cell), protocol=point.protocol, schedule_settings=point.schedule_settings)


def another_value(value: Any, field: Field[Any]) -> Any:
    """A valid value of a field that is not `value`."""
    if "tuple" in str(field.type):
        return ("bias",) if field.metadata["choices"] else (0.2,)
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice not in (value, PUBLISHED))
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2
    return value + 1 if value else 1


@given(
    st.sampled_from(sorted(set(OWNERS) - set(NO_AXIS) - set(LORA_SETTINGS))),
    st.sampled_from([mode for mode in MODES if MODES[mode].is_pruned]),
    st.sampled_from(["unstructured", "wanda", "random"]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from(["none", "reconstruct"]),
)
def test_a_cell_reads_a_setting_where_its_identity_does(
    name: str, mode: str, method: str, sparsity: float, recover: str
) -> None:
    cell = make_cell(mode=mode, method=method, sparsity=sparsity).trained
    run = make_run(cell, protocol=replace(make_run().protocol, recover=recover))
    owner, field = OWNERS[name]
    place = "protocol" if owner is Protocol else "schedule_settings"
    own = getattr(run, place)
    changed = replace(run, **{place: replace(own, **{name: another_value(getattr(own, name), field)})})
    assert reads_setting(cell, name, recover) == (changed.identity != run.identity), name


def test_cells_that_ignore_an_axis_are_there_once() -> None:
    names = {"modes": "sparse-to-sparse masked-finetuning", "methods": "unstructured wanda"}
    ranks = asked({"lora_rank": "8,16"}, **names)
    assert [len(at_points(ranks, make_cell(mode=mode))) for mode in ranks.modes] == [2, 1]
    tokens = asked({"calibration_tokens": "64,128"}, **names)
    assert [len(at_points(tokens, make_cell(method=method))) for method in tokens.methods] == [1, 2]
    assert len(at_points(tokens, make_cell(method="wanda", sparsity=0.0))) == 1
    recovered = asked({"recover": "none,reconstruct", "calibration_tokens": "4096,8192"}, methods="unstructured")
    assert [dict(point.point) for point in at_points(recovered, make_cell())] == [
        {"recover": "none"},
        {"recover": "reconstruct", "calibration_tokens": 4096},
        {"recover": "reconstruct", "calibration_tokens": 8192},
    ]
    assert len(requested_points(ranks)) == 2 * (2 + 1)


BROKEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"learning_rat": "1,2"}, {}, r"unknown axis 'learning_rat'\. Did you mean 'learning_rate'"),
    ({"sparsities": "0.1,0.2"}, {}, "unknown axis 'sparsities'"),
    ({"learning_rate": "1e-3"}, {}, r"the axis learning_rate must have two values or more, got \(0\.001,\)"),
    ({"learning_rate": "1e-3,0.001"}, {}, r"the axis learning_rate must not repeat a value, got \(0\.001, 0\.001\)"),
    ({"train_also": "norm bias,bias norm"}, {}, "the axis train_also must not repeat a value"),
    ({"learning_rate": "1e-3,fast"}, {}, r"learning_rate \(.*\) must be float, got 'fast'"),
    (RATES, {"learning_rate": 1e-3}, "learning_rate is an axis, so it has no other value"),
    (RATES | {"learning_rate:steps": "1:2,2:3"}, {}, "learning_rate must be on one axis"),
    ({"learning_rate:steps": "1,2"}, {}, r"each point of the axis learning_rate:steps has 2 values, got '1'"),
    ({"n_test": "100,200"}, {}, "n_test cannot be an axis: it changes how models are scored"),
    ({"train_on_prompt": "true,false"}, {}, "train_on_prompt cannot be an axis: it changes what the loss"),
    ({"masked_lora_impl": "auto,effective-weight"}, {}, "masked_lora_impl cannot be an axis: it changes no number"),
    ({"steps": "0,10"}, {}, r"at steps=0: steps must be at least 1, got 0"),
    (
        {"learning_rate": "1e-4,3e-3"},
        {},
        r"at learning_rate=0\.0001: final_learning_rate must be between 0 and learning_rate, got 0\.0003\. Lower it\. "
        r"Or pair the two, as --axis learning_rate:final_learning_rate=0\.0001:1e-05,",
    ),
    ({"steps": "5,70", "warmup_steps": "6,1"}, {}, r"at steps=5 warmup_steps=6: the warm-up must be shorter"),
    ({"lora_rank": "8,16"}, {"backend": "cerebras"}, "graphs for a CS-3 are planned for one lora_rank"),
    ({"lora_rank": "8,16"}, {"modes": "masked-finetuning"}, "at lora_rank=8: the mode masked-finetuning trains the"),
    ({"packing": "true,false"}, {"backend": "both"}, "at packing=true: the backend cerebras needs packing = False"),
    ([1, 2], {}, r"axes must map settings to values, got \[1, 2\]"),
]


@pytest.mark.parametrize(("axes", "names", "message"), BROKEN, ids=lambda case: str(case)[:60])
def test_a_broken_axis_is_refused_with_its_point(axes: Any, names: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        asked(axes, **names)


@pytest.mark.parametrize(
    ("name", "values", "names"),
    [
        ("calibration_tokens", "64,128", {}),
        ("drop_fraction", "0.1,0.3", {"modes": "masked-finetuning"}),
        ("recover", "none,reconstruct", {"sparsities": 0.0}),
    ],
)
def test_an_axis_that_every_cell_ignores_is_refused(name: str, values: str, names: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"an axis must change some training, got {name}, which every mode"):
        check_names(asked({name: values}, **names))


def test_what_no_method_could_do_at_one_point_is_refused() -> None:
    with pytest.raises(InputError, match="taylor needs gradients"):
        check_names(asked({"calibration_order": "dense,sequential"}, methods="taylor"))
