"""What a candidate costs besides its evaluation: `python tests/bench_search.py` (a table, then one JSON line).

- switch_fraction: seconds to give a 7B-shaped layer (4096 x 4096, R = 32, masked) another rank, over those of its
  product with the tokens of an evaluation. Goal: under 0.01.
- suggest: milliseconds a suggestion at 100 dimensions, mean of the last 20 of 500, each sampler. Goal: at most 20.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tune_sparse.masked_linear import DenseStored, Workspace
from tune_sparse.search_config import SAMPLERS
from tune_sparse.searchers import searcher_named
from tune_sparse.space import Group, Space
from tune_sparse.subadapter import Layer

TOKENS = 20_000
"""Of an evaluation: 200 questions of 100 tokens."""
MEASURED_TOKENS = 500


def seconds(work: Callable[[], object]) -> float:
    """Median process CPU time of five."""
    found = []
    for _ in range(5):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found)


@torch.no_grad()
def switch_fraction() -> float:
    mask = torch.rand(4096, 4096) > 0.5
    weight, A, B = torch.randn(4096, 4096) * mask, torch.randn(32, 4096), torch.randn(4096, 32)
    layer, own = Layer(weight, A, B, 2.0, DenseStored(weight, mask, Workspace()), None), weight.clone()
    x = torch.randn(MEASURED_TOKENS, 4096)
    switch = seconds(lambda: own.copy_(layer.deployed(24)))
    return switch / (seconds(lambda: F.linear(x, own)) * TOKENS / MEASURED_TOKENS)


def suggest_ms(sampler: str, trials: int = 500, last: int = 20) -> float:
    space = Space(tuple(Group(f"g{n}", (f"m{n}",), (32, 24, 16)) for n in range(10)))
    searcher, rng, found = searcher_named(sampler, space, 10, 0, ("accuracy", "parameters")), random.Random(0), []
    for number in range(trials):
        start = time.process_time()
        ranks = searcher.suggest(str(number))
        found.append(time.process_time() - start)
        cost = sum(ranks.values())
        searcher.on_trial_complete(str(number), {"accuracy": rng.random() + cost / 1e4, "cost": cost})
    return 1000 * statistics.fmean(found[-last:])


def main() -> None:
    torch.set_num_threads(1)
    values = {"switch_fraction": switch_fraction()} | {f"suggest_ms_{name}": suggest_ms(name) for name in SAMPLERS}
    for name, value in values.items():
        print(f"{name:26}{value:10.4f}")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
