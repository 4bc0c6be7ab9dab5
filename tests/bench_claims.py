"""How often each sentence of the findings is wrong, and how much it takes to find half a logit: docs/statistics.md.

    python tests/bench_claims.py [--sweeps 4000]

Goals, of each rate: the lower end of its 95% interval (Wilson) is not above 5%, and it is not above 6.5% itself.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from benchmarks import bench_parser
from worlds import World, draw, falls_wrong, found, larger_p_wrong, wrong

from analysis.stats.scopes import Scope
from analysis.stats.statistics import wilson

WORLDS = {
    "no effects": World(),
    "model effects": World(by_model=0.3),
    "task effects": World(by_task=0.3),
    "both": World(by_model=0.3, by_task=0.3),
    "shared examples": World(by_example=1.0),
    "luck common to a seed": World(seed_luck=0.3),
    "random masks": World(mask_luck=0.3),
    "all of these": World(by_model=0.3, by_task=0.3, by_example=1.0, seed_luck=0.3),
}
SENTENCES = {
    "these trainings, 2 x 3": (Scope.TRAININGS, {}),
    "these models and tasks, 2 x 3, 3 seeds": (Scope.LISTED, {"seeds": 3}),
    "these models and tasks, 1 x 1, 3 seeds": (Scope.LISTED, {"models": 1, "tasks": 1, "seeds": 3}),
    "models in general, 5 x 3": (Scope.MODELS, {"models": 5}),
    "tasks in general, 2 x 5": (Scope.TASKS, {"tasks": 5}),
    "models and tasks in general, 5 x 5": (Scope.BOTH, {"models": 5, "tasks": 5}),
    "models and tasks in general, 8 x 8": (Scope.BOTH, {"models": 8, "tasks": 8}),
}
VARIED = World(effect=0.5, by_model=0.3, by_task=0.3, by_example=0.5)
SEEDS, UNITS = (3, 5, 10), (5, 6, 8, 10, 12, 16, 20)
POWERS = {
    "these models and tasks, 1 x 1": (Scope.LISTED, {"models": 1, "tasks": 1}, "seeds", SEEDS),
    "these models and tasks, 1 x 3": (Scope.LISTED, {"models": 1}, "seeds", SEEDS),
    "these models and tasks, 2 x 3": (Scope.LISTED, {}, "seeds", SEEDS),
    "models in general, 3 tasks": (Scope.MODELS, {}, "models", UNITS),
    "tasks in general, 2 models": (Scope.TASKS, {}, "tasks", UNITS),
}
FALLS = {1: (0.0,), 3: (0.0, 0.15, 0.5)}
"""luck by seeds: of one seed the interval holds for its trainings alone"""


def rates(sweeps: int) -> dict[str, dict[str, float]]:
    """{sentence: {world: how often it is wrong}}; random masks allow no sentence on tasks in general."""
    return {
        name: {
            world: wrong(replace(w, **changes), scope, sweeps)
            for world, w in WORLDS.items()
            if not (scope is Scope.TASKS and w.mask_luck)
        }
        for name, (scope, changes) in SENTENCES.items()
    }


def powers(sweeps: int) -> dict[str, dict[str, float]]:
    """{sentence: {how many: how often half a logit is found}}"""
    table = {
        name: {f"{n} {axis}": found(replace(VARIED, **changes, **{axis: n}), scope, sweeps) for n in counts}
        for name, (scope, changes, axis, counts) in POWERS.items()
    }
    table["models and tasks in general"] = {
        f"{n} x {n}": found(replace(VARIED, models=n, tasks=n), Scope.BOTH, sweeps) for n in UNITS[:4]
    }
    return table


def falls(sweeps: int) -> dict[str, dict[str, float]]:
    """{the largest of nine falls: {luck: how often it is claimed where there is none}}"""
    table = {
        f"the largest of nine falls, {seeds} seeds": {
            f"luck {luck}": falls_wrong(seeds, luck, sweeps) for luck in lucks
        }
        for seeds, lucks in FALLS.items()
    }
    table["the same with its own interval"] = {"luck 0": falls_wrong(1, 0.0, sweeps, simultaneous=False)}
    return table


def larger_p(sweeps: int) -> dict[str, dict[str, float]]:
    """What the larger p of models and of tasks would claim for both in general."""
    worlds = {f"{n} x {n}": replace(WORLDS["both"], models=n, tasks=n) for n in (5, 8)}
    return {"the larger p alone": {name: larger_p_wrong(world, sweeps) for name, world in worlds.items()}}


def misses(table: dict[str, dict[str, float]], sweeps: int) -> list[str]:
    """The rates that miss a goal."""
    listed = [(f"{name}, {world}", rate) for name, by_world in table.items() for world, rate in by_world.items()]
    return [f"{name}: {rate}" for name, rate in listed if rate > 0.065 or wilson(rate * sweeps, sweeps)[0] > 0.05]


def shown(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    for name, row in table.items():
        print(
            f"| {name} | " + " | ".join(f"{column}: {100 * rate:.1f}%" for column, rate in row.items()) + " |",
            flush=True,
        )
    return table


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--sweeps", type=int, default=4000)
    chosen = parser.parse_args()
    sweeps = 4 if chosen.smoke else chosen.sweeps
    claimed = shown(rates(sweeps))
    others = {"falls": shown(falls(sweeps)), "larger_p": shown(larger_p(sweeps))}
    power = shown(powers(max(4, sweeps // 4)))
    half_a_logit = draw(VARIED, np.random.default_rng(0)).truth(Scope.BOTH)
    found = {"sweeps": sweeps, "missed": misses(claimed, sweeps), "half_a_logit": half_a_logit, "power": power}
    print(json.dumps(found | {"rates": claimed} | others))


if __name__ == "__main__":
    main()
