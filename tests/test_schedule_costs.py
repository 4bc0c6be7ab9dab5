"""Between two updates or records of the masks a step costs what a one-shot step does; both together are a twentieth of
the interval."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from schedule_costs import SETTINGS, STEPS, interval_share, step_costs

from tune_sparse.schedules import ONE_SHOT, SCHEDULES

pytestmark = pytest.mark.xdist_group("simulated device")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["rigl", "set", "gradual"])
def test_a_schedule_costs_at_updates_and_records_alone(
    schedule: str, device_process: ProcessPoolExecutor, llama: Path
) -> None:
    plain, costs = (device_process.submit(step_costs, llama, name).result() for name in (ONE_SHOT, schedule))
    at = [step for step, cost in costs.items() if cost != plain[step]]
    updates = {update.step for update in SCHEDULES[schedule].plan(SETTINGS, 0.5, STEPS)} & costs.keys()
    records = {step for step in costs if step % SETTINGS.dynamics_every == 0} - updates
    assert updates
    assert records
    assert set(at) == updates | records
    assert all(costs[step].waits == 1 for step in costs.keys() - set(at))  # for the loss
    update, record = (
        [interval_share(schedule, plain[step], costs[step]) for step in steps] for steps in (updates, records)
    )
    for kind in (0, 1):  # operations, bytes
        assert max(shares[kind] for shares in update) + max(shares[kind] for shares in record) <= 0.05
