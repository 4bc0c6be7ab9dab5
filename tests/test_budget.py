from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from factories import done_record, failed_record, make_cell, make_run, make_sweep, write_run

from tune_sparse.config import Cell, Protocol, SweepConfig
from tune_sparse.config.spending import BudgetLimit
from tune_sparse.errors import InputError
from tune_sparse.ledger.curves import Bracket
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.budget import Budget
from tune_sparse.sweep.examples import Examples
from tune_sparse.sweep.plan import Plan
from tune_sparse.sweep.purchase import needed_levels, purchase
from tune_sparse.sweep.wanted import WantedRuns, check_budget

LEVELS = (0.0, 0.3, 0.5, 0.7)


def make_plan(**changes: object) -> Plan:
    """Two curves of three levels over one dense run: seven runs."""
    cells = [make_cell(mode=mode, sparsity=s) for mode in ("sparse-to-dense", "sparse-to-sparse") for s in LEVELS]
    runs = {run.run_id: run for run in map(make_run, dict.fromkeys(cell.trained for cell in cells))}
    config = SweepConfig(models=("tiny",), tasks=("boolq",), sparsities=LEVELS, **changes)  # type: ignore[arg-type]
    return Plan(config, make_sweep(cells), runs, {}, Examples(None, {}, {}, None))


def run_at(plan: Plan, sparsity: float, mode: str = "sparse-to-dense") -> Run:
    cell = make_cell(sparsity=sparsity, mode=mode).trained
    return next(run for run in plan.runs.values() if run.cell == cell)


def write_done(ledger: Ledger, run: Run, seconds: float = 3600.0) -> None:
    record = done_record(run)
    write_run(ledger, run, replace(record, measured=record.measured | {"trial_seconds": seconds, "held": {"CPU": 2}}))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def test_runs_that_ended_count_and_those_that_run(ledger: Ledger) -> None:
    plan = make_plan()
    write_done(ledger, run_at(plan, 0.0))
    ledger.write_record(run_at(plan, 0.3), failed_record(run_at(plan, 0.3)))
    budget = Budget(BudgetLimit(3, "runs"), plan, ledger)
    assert (budget.spent, budget.left) == (2, 1)
    budget.started(run_at(plan, 0.5))
    assert not budget.allows(run_at(plan, 0.7))
    assert budget.stopped_before == run_at(plan, 0.7)
    budget.stopped(run_at(plan, 0.5).run_id)
    assert budget.allows(run_at(plan, 0.7))
    assert budget.stopped_before is None


def test_the_first_of_its_kind_runs_alone_and_tells_what_the_others_take(ledger: Ledger) -> None:
    plan = make_plan()
    budget = Budget(BudgetLimit(5, "cpu-hours"), plan, ledger)
    first = run_at(plan, 0.5)
    assert budget.allows(first)
    budget.started(first)
    assert not budget.allows(run_at(plan, 0.7))
    assert budget.stopped_before is None, "it only waits"
    write_done(ledger, first)
    record = ledger.record(first.run_id)
    assert record
    budget.ended(record)
    assert budget.spent == 2, "an hour on two cores"
    budget.started(run_at(plan, 0.7))
    assert not budget.allows(run_at(plan, 0.3)), "2 + 2 + 2 are more than 5"


def test_a_run_of_an_axis_is_expected_to_take_what_its_own_steps_do(ledger: Ledger) -> None:
    """Two of the three seconds of a measured run are its training."""
    short = make_run(make_cell(sparsity=0.5), protocol=Protocol(steps=100))
    long, wide = (make_run(short.cell, protocol=p) for p in (Protocol(steps=400), Protocol(steps=50, lora_rank=64)))
    plan = replace(make_plan(), runs={run.run_id: run for run in (short, long, wide)})
    record = done_record(short)
    measured = {"trial_seconds": 3 * 3600.0, "train_seconds": 2 * 3600.0, "held": {"CPU": 1}}
    write_run(ledger, short, replace(record, measured=record.measured | measured))
    budget = Budget(BudgetLimit(50, "cpu-hours"), plan, ledger)
    assert (budget.expected(short), budget.expected(long)) == (pytest.approx(3), pytest.approx(1 + 4 * 2))
    assert budget.expected(wide) == pytest.approx(1 + 2 / 2), "none of its rank was measured"
    stopped = {"step": 100, "steps": 400, "by": "loss", "values": {}}
    ledger.write_record(long, Record(long.run_id, long.identity, "stopped", stopped=stopped))
    assert Budget(BudgetLimit(50, "cpu-hours"), plan, ledger).spent == pytest.approx(3 + 9 / 4)
    assert Budget(BudgetLimit(50, "runs"), plan, ledger).spent == 2


def test_a_level_of_several_points_is_counted_with_all_of_them(ledger: Ledger) -> None:
    plan = make_plan(find=("within=0.1",))
    rows = [row | {"axes": {"x": n}, "run_id": f"{n} {row['run_id']}"} for row in plan.record.cells for n in (1, 2)]
    runs = {f"{n} {run_id}": run for run_id, run in plan.runs.items() for n in (1, 2)}
    some = purchase(replace(plan, record=replace(plan.record, cells=tuple(rows)), runs=runs), ledger, [])
    assert some is not None
    assert some.runs == (2 * 3, 2 * 5)
    few = make_plan(find=("within=0.1",), budget="5runs")
    few = replace(few, record=replace(few.record, cells=tuple(rows)), runs=runs)
    with pytest.raises(InputError, match=r"must buy one bracket: .* takes about 6 runs, got 5 runs"):
        check_budget(few, ledger, [])


def test_a_budget_of_hours_that_buys_no_bracket_is_refused_with_the_cheapest(ledger: Ledger) -> None:
    plan = make_plan(find=("within=0.1",), budget="5cpu-hours")
    check_budget(plan, ledger, list(plan.runs.values()))
    write_done(ledger, run_at(plan, 0.5))
    with pytest.raises(InputError, match=r"two levels of tiny boolq unstructured sparse-to-dense, takes about 6 cpu-h"):
        check_budget(plan, ledger, plan.missing(ledger))


def test_a_plan_is_handed_out_in_its_order_within_the_budget(ledger: Ledger) -> None:
    plan = make_plan(budget="3runs")
    wanted = WantedRuns(plan, ledger, list(plan.runs.values()), everything=False)
    [source] = wanted.sources(lambda run: "torch", lambda name: 0).values()
    given: list[Cell] = []
    while run := source.peek():
        source.take()
        given.append(run.cell)
    assert given == [run.cell for run in plan.runs.values()][:3]
    assert wanted.spent == "the budget of 3 runs is spent but for 3", "they have not ended"


def test_a_forecast_says_what_is_bought(ledger: Ledger) -> None:
    runs = list(make_plan().runs.values())
    assert purchase(make_plan(), ledger, runs) is None
    some = purchase(make_plan(budget="3runs"), ledger, runs)
    assert some is not None
    assert some.lines() == ["The budget of 3 runs has 3 left, which buys 3 of 7 runs, in the order of the plan"]
    found = purchase(make_plan(find=("within=0.1",), budget="3runs"), ledger, runs)
    assert found is not None
    assert (found.curves, found.runs, found.buys_curves) == (2, (3, 5), (1, 2))


def test_a_curve_needs_one_run_at_its_ends_and_never_more_than_bisection() -> None:
    nine = tuple(level / 10 for level in range(1, 10))
    assert needed_levels(Bracket(nine, {}), 1) == (1, 4)
    assert needed_levels(Bracket(nine, {}), 3) == (1, 3)
    assert needed_levels(Bracket(nine, {4: True, 6: False}), 1) == (1, 1)
