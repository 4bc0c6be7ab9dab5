"""What schedules cost, counted: `python tests/bench_schedules.py --model FOLDER`.

Of each schedule: operations and bytes of a step as a one-shot training takes it, of a step with an update, and of the
update as a fraction of its interval in the default protocol. On the simulated device: no time is measured.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from schedule_costs import default_interval, interval_share, step_costs
from simulated_device import register

from tune_sparse.schedules import ONE_SHOT, SCHEDULES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of a toy model")
    model = parser.parse_args().model
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=register) as process:
        plain = process.submit(step_costs, model, ONE_SHOT).result()
        print("schedule  interval  operations  with update  bytes  with update  share of interval: operations, bytes")
        for name in (name for name, facts in SCHEDULES.items() if facts.planner):
            costs = process.submit(step_costs, model, name).result()
            for step in (step for step, cost in costs.items() if cost != plain[step]):
                with_update, alone = costs[step], plain[step]
                operations, moved = interval_share(name, alone, with_update)
                counts = (
                    f"{alone.operations.total()} {with_update.operations.total()} {alone.bytes} {with_update.bytes}"
                )
                print(f"{name} {default_interval(name):g} {counts} {operations:.2%} {moved:.2%}")


if __name__ == "__main__":
    main()
