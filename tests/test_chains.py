"""The levels of an iterative chain, as a plan has them: runs that derive from the last one alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import done_record, failed_record, make_cell, make_run
from hypothesis import given
from hypothesis import strategies as st

from analysis.read.load import cells_table
from tune_sparse.config import ScheduleSettings, SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.models.dims import ModelDims
from tune_sparse.schedules import SCHEDULES, Level
from tune_sparse.sweep.chains import Chains, chain, check_chains, check_nested, last_of_chain
from tune_sparse.sweep.plan import Plan, distinct_trainings, make_plan

ITERATIVE = SCHEDULES["iterative"]
CONFIG: dict[str, Any] = {
    "tasks": ["boolq"],
    "data_dir": "synthetic",
    "methods": ["unstructured"],
    "sparsities": [0.3, 0.5],
    "modes": ["masked-finetuning"],
    "schedules": ["one-shot", "iterative"],
    "steps": 32,
}


PlanOf = Callable[..., Plan]
"""Plans `CONFIG` with other settings."""


@pytest.fixture
def plan_of(llama: Path) -> PlanOf:
    return lambda **changes: make_plan(SweepConfig.from_names(CONFIG | {"models": [str(llama)]} | changes))


def levels_in(plan: Plan) -> list[tuple[float, int, int]]:
    """(sparsity, steps in all, own steps) of each run with levels, in the order of the plan."""
    return [(r.cell.sparsity, r.protocol.steps, r.own_steps) for r in plan.runs.values() if r.is_level]


def test_the_steps_are_divided_among_the_levels_by_hand() -> None:
    found = ITERATIVE.levels(ScheduleSettings(), 0.5, 32)
    assert found == [Level(0.1, 11), Level(0.3, 11), Level(0.5, 10)]
    assert ITERATIVE.levels(ScheduleSettings(levels=(0.2, 0.4, 0.6)), 0.4, 5) == [Level(0.2, 3), Level(0.4, 2)]
    assert ITERATIVE.levels(ScheduleSettings(steps_per_level=7), 0.3, 32) == [Level(0.1, 7), Level(0.3, 7)]
    assert ITERATIVE.levels(ScheduleSettings(), 0.1, 32) == [Level(0.1, 32)]
    assert ITERATIVE.levels(ScheduleSettings(), 0.0, 32) == SCHEDULES["rigl"].levels(ScheduleSettings(), 0.5, 32) == []


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8, unique=True), st.integers(8, 400), st.booleans())
def test_a_chain_cut_short_is_the_chain_of_the_run_where_it_is_cut(
    sparsities: list[float], steps: int, restarts: bool
) -> None:
    settings = ScheduleSettings(levels=tuple(sorted(sparsities)), restart_learning_rate=restarts)
    levels = ITERATIVE.levels(settings, 0.995, steps)
    cell = make_cell(mode="masked-finetuning", schedule="iterative", sparsity=0.995)
    runs = chain(last_of_chain(make_run(cell, schedule_settings=settings), levels))
    assert [(run.cell.sparsity, run.own_steps) for run in runs] == [(level.sparsity, level.steps) for level in levels]
    assert sum(run.own_steps for run in runs) == runs[-1].protocol.steps == steps
    assert [run.protocol.steps - run.own_steps for run in runs] == [0, *(run.protocol.steps for run in runs[:-1])]
    assert {run.chain_steps for run in runs} == {None if restarts else steps}
    assert [Run.from_config(run.as_config()) for run in runs] == runs


def test_levels_on_the_way_are_runs_and_rows_of_the_plan(plan_of: PlanOf) -> None:
    plan = plan_of()
    assert levels_in(plan) == [(0.1, 16, 16), (0.3, 32, 16), (0.1, 11, 11), (0.3, 22, 11), (0.5, 32, 10)]
    rows = [(row["sparsity"], row["run_id"]) for row in plan.record.cells if row["schedule"] == "iterative"]
    assert rows == [(run.cell.sparsity, run.run_id) for run in plan.runs.values() if run.is_level]
    assert distinct_trainings(plan.config) == len(plan.runs) == 7
    ways = [row.get("chain_to") for row in plan.record.cells if row["schedule"] == "iterative"]
    assert ways == [0.3, None, 0.5, 0.5, None]
    assert {row["cell_id"] for row in plan.record.cells} == plan.runs.keys()


def test_chains_with_the_same_steps_a_level_share_their_beginning_and_a_larger_target_goes_on(plan_of: PlanOf) -> None:
    plan, larger = plan_of(steps_per_level=4), plan_of(steps_per_level=4, sparsities=[0.7])
    assert levels_in(plan) == [(0.1, 4, 4), (0.3, 8, 4), (0.5, 12, 4)]
    done = {run.run_id for run in plan.runs.values() if run.is_level}
    assert [run.cell.sparsity for run in larger.runs.values() if run.is_level and run.run_id not in done] == [0.7]
    assert distinct_trainings(plan.config) == len(plan.runs)


def test_a_run_says_which_budget_and_learning_rates_it_has(plan_of: PlanOf) -> None:
    over_all = plan_of(restart_learning_rate=False, sparsities=[0.5], warmup_steps=9)
    first, *_, last = (run for run in over_all.runs.values() if run.is_level)
    assert (first.own_protocol.steps, first.chain_steps, last.chain_steps) == (11, 32, 32)
    again = plan_of(sparsities=[0.5], warmup_steps=9)
    assert not {run.run_id for run in again.runs.values() if run.is_level} & over_all.runs.keys()


def test_a_later_level_shares_neither_its_pruning_nor_its_accuracy_before_tuning(plan_of: PlanOf) -> None:
    shot, *levels = (r for r in plan_of(methods=["wanda"]).runs.values() if r.cell.sparsity == 0.3)
    assert len({run.pruning_id for run in (shot, *levels)}) == len({r.pruned_baseline_id for r in (shot, *levels)}) == 3
    shot, *levels = (r for r in plan_of(methods=["wanda"], rescore=False).runs.values() if r.cell.sparsity == 0.3)
    assert {run.pruning_id for run in levels} == {shot.pruning_id}, "the masks of the dense model"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"levels": [0.5, 0.3]}, "levels must rise"),
        ({"levels": [0.0, 0.3]}, r"in \(0, 1\)"),
        ({"levels": [0.3, 0.6]}, "below the largest sparsity"),
        ({"steps": 2, "warmup_steps": 0}, "each of 3 levels up to 0.5 must be trained at least one step"),
        ({"warmup_steps": 10}, "the warm-up must be shorter than the training of 10 steps"),
        ({"recover": "reconstruct"}, "levels are not recovered"),
        ({"methods": ["sparsegpt"], "rescore": False}, "must not update"),
        ({"methods": ["wanda-2:4"], "sparsities": [0.5]}, "one sparsity"),
    ],
)
def test_levels_that_cannot_be_are_refused_before_anything_trains(
    plan_of: PlanOf, changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(InputError, match=rule):
        plan_of(**changes)


def test_structured_levels_that_would_give_something_back_are_refused() -> None:
    dims = ModelDims.from_config(_two_groups())
    levels = [Level(sparsity, 1) for sparsity in (0.24, 0.26)]
    with pytest.raises(InputError, match="what a level prunes must stay pruned"):
        check_nested("structured", dims, levels)
    check_nested("unstructured", dims, levels)


def _two_groups() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64, intermediate_size=300, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )


def test_a_level_is_ready_once_the_one_before_it_is_done(plan_of: PlanOf, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first, second, third = (run for run in plan_of(sparsities=[0.5]).runs.values() if run.is_level)
    chains = Chains(ledger, [first, second, third])
    assert [chains.is_ready(run) for run in (first, second, third)] == [True, False, False]
    chains.ended(done_record(first))
    assert [chains.is_ready(run) for run in (first, second, third)] == [True, True, False]
    chains.ended(failed_record(second))
    assert not chains.is_ready(third)
    assert chains.lines() == [f"left: {third.run_id}: its level before, {second.run_id}, is not done"]
    ledger.write_record(first, done_record(first))
    assert Chains(ledger, [second]).is_ready(second)


def test_a_table_has_one_level_of_a_sparsity_that_of_the_longest_chain(plan_of: PlanOf, tmp_path: Path) -> None:
    plan, ledger = plan_of(), Ledger(tmp_path)
    ledger.write_sweep(plan.record)
    cells = cells_table([tmp_path])
    shown = cells[cells["schedule"] == "iterative"]["run_id"]
    assert [(plan.runs[run_id].cell.sparsity, plan.runs[run_id].protocol.steps) for run_id in shown] == [
        (0.3, 32),
        (0.1, 11),
        (0.5, 32),
    ]


@pytest.mark.parametrize(
    ("axes", "why"),
    [
        ({"rescore": "true,false"}, "rescore=false takes the masks of the dense model"),
        ({"steps": "2,32"}, "must be trained at least one step, got 2"),
        ({"recover": "none,reconstruct"}, "levels are not recovered"),
    ],
)
def test_levels_are_checked_at_every_point_of_the_axes(axes: dict[str, str], why: str) -> None:
    asked = {"models": "tiny-llama", "tasks": "boolq", "methods": "sparsegpt", "sparsities": 0.5, "axes": axes}
    asked |= {"modes": "masked-finetuning", "schedules": "iterative"} | ({} if "steps" in axes else {"steps": 32})
    with pytest.raises(InputError, match=why):
        check_chains(SweepConfig.from_names(asked))
