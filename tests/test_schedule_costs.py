"""Between two updates of the masks a step costs what a one-shot step does; an update is a twentieth of its interval."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from schedule_costs import interval_share, step_costs

from tune_sparse.schedules import ONE_SHOT

pytestmark = pytest.mark.xdist_group("simulated device")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["rigl", "set", "gradual"])
def test_a_schedule_costs_at_its_updates_alone(schedule: str, device_process: ProcessPoolExecutor, llama: Path) -> None:
    plain, costs = (device_process.submit(step_costs, llama, name).result() for name in (ONE_SHOT, schedule))
    at = [step for step, cost in costs.items() if cost != plain[step]]
    assert 1 <= len(at) < len(costs)
    assert all(costs[step].waits == 1 for step in costs.keys() - set(at))  # for the loss
    for step in at:
        operations, moved = interval_share(schedule, plain[step], costs[step])
        assert operations <= 0.05
        assert moved <= 0.05
