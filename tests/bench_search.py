"""What a candidate costs besides its evaluation, and what racing saves: `python tests/bench_search.py [RESULTS ...]`
(a table, then one JSON line; `--smoke`: few suggestions and candidates, small layers). Trains a small super-adapter
first.

- score_fraction: CPU seconds to score a candidate in a warm worker (switch, answers, correctness), over those of the
  evaluation alone; median of 9 pairs. Goal: at most 1.05.
- worker_mb: resident memory of that worker after 20 and after 300 candidates. Goal: the same.
- switch_fraction: seconds to give a 7B-shaped layer (4096 x 4096, R = 32, masked) another rank, over those of its
  product with the tokens of an evaluation. Goal: under 0.01.
- suggest: milliseconds a suggestion at 100 dimensions, mean of the last 20 of 500, each sampler. Goal: at most 20.
- simulated_races: of equally good candidates, the fraction that racing stops, and of races with one that is truly 2
  points better, the fraction that stops it; 300 races, with both objectives and with accuracy alone.
- racing: only with results folders of `tune-sparse search --no-racing --trials 300`. Their candidates race again, on
  what they answered: the share of the answers that were asked, whether the winner is the one of all answers, and how
  many points less accurate the best is. Goals: 1/3 and the same winner, or 1/5 and 0.25 points.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from benchmarks import bench_parser, toy
from simulated_races import race_of_equals

from search_spaces import subadapters
from search_spaces.matrix import PRESETS
from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.config import SweepConfig
from tune_sparse.evaluation.scoring import compute_outcomes
from tune_sparse.files import read_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.lora.masked_linear import EffectiveWeight, Workspace
from tune_sparse.lora.rank_space import Group, Ranks, Space
from tune_sparse.lora.slices import count_layers
from tune_sparse.search.config import SAMPLERS, SearchConfig
from tune_sparse.search.journal import Candidate
from tune_sparse.search.plan import plan_search
from tune_sparse.search.racing import WARM_UP, Correctness, Race, cut_stages, most_divisive_first
from tune_sparse.search.samplers import searcher_named
from tune_sparse.search.scorer import SliceScorer

TOKENS = 20_000
"""Of an evaluation: 200 questions of 100 tokens."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    width: int = 4096
    measured_tokens: int = 500
    suggestions: int = 500
    candidates: int = 300
    races: int = 300


SMOKE = Sizes(256, 50, 30, 20, 3)


def seconds(work: Callable[[], object]) -> float:
    """Median process CPU time of five."""
    found = []
    for _ in range(5):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found)


@torch.no_grad()
def switch_fraction(sizes: Sizes) -> float:
    width = sizes.width
    mask = torch.rand(width, width) > 0.5
    weight, A, B = torch.randn(width, width) * mask, torch.randn(32, width), torch.randn(width, 32)
    impl, own = EffectiveWeight(weight, mask, Workspace()), weight.clone()
    x = torch.randn(sizes.measured_tokens, width)
    switch = seconds(lambda: own.copy_(impl.effective(weight, A[:24], B[:, :24], 2.0)))
    return switch / (seconds(lambda: F.linear(x, own)) * TOKENS / sizes.measured_tokens)


def suggest_ms(sampler: str, trials: int, last: int = 20) -> float:
    space = Space(tuple(Group(f"g{n}", (f"m{n}",), (32, 24, 16)) for n in range(10)))
    searcher, rng, found = searcher_named(sampler, space, 10, 0, ("accuracy", "parameters")), random.Random(0), []
    for number in range(trials):
        start = time.process_time()
        ranks = searcher.suggest(str(number))
        found.append(time.process_time() - start)
        cost = sum(ranks.values())
        searcher.on_trial_complete(str(number), {"accuracy": rng.random() + cost / 1e4, "cost": cost})
    return 1000 * statistics.fmean(found[-last:])


def warm_worker(results_dir: Path, model: str) -> SliceScorer:
    """With a super-adapter of a few steps: what it says does not matter here."""
    few = {"models": model, "tasks": "boolq", "methods": "wanda", "sparsities": 0.7, "modes": "sparse-to-sparse"}
    few |= {"steps": 2, "warmup_fraction": 0.0, "n_test": 10, "results_dir": results_dir}
    preset = PRESETS["toy"] | subadapters.PROTOCOL | subadapters.TOY_PROTOCOL
    space = Space.from_groups(subadapters.PRESETS["toy"])
    run, ledger = plan_search(SearchConfig(SweepConfig.from_names(preset | few), space)).run, Ledger(results_dir)
    for _ in run_cell(run, ledger, WorkerCache()):
        pass
    return SliceScorer.from_run(run, ledger)


def sample_candidates(scorer: SliceScorer, count: int) -> list[Ranks]:
    space, layers = scorer.slices.space, count_layers(scorer.slices.model)
    return [space.sample_ranks(layers, number, 0, "uniform") for number in range(count)]


def score(scorer: SliceScorer, ranks: Ranks, examples: Sequence[int]) -> Correctness:
    nothing = Correctness(len(scorer.tests.examples))
    return nothing.adding(scorer.answers(ranks, examples, nothing))


def score_fraction(scorer: SliceScorer) -> float:
    everything, found = range(len(scorer.tests.examples)), []
    for ranks in sample_candidates(scorer, 9):
        start = time.process_time()
        score(scorer, ranks, everything)
        scored = time.process_time()
        for _ in compute_outcomes(scorer.slices.model, scorer.tokenizer, scorer.tests, scorer.protocol):
            pass
        found.append((scored - start) / (time.process_time() - scored))
    return statistics.median(found)


def worker_mb(scorer: SliceScorer, count: int) -> tuple[float, float]:
    resident = []
    for ranks in sample_candidates(scorer, count):
        score(scorer, ranks, range(10))
        resident.append(psutil.Process().memory_info().rss / 1e6)
    return resident[19], resident[-1]


def raced(answered: Sequence[tuple[Correctness, float]], minimises_cost: bool) -> dict[str, Any]:
    """How candidates race, in their order: (what they answered in full, their cost)."""
    n, answers, stages = answered[0][0].n, 0, [list(range(answered[0][0].n))]
    race, full = Race(n, minimises_cost), Race(n, minimises_cost)
    for key, (correctness, cost) in enumerate(answered):
        full.update(str(key), cost, correctness)
        if key == WARM_UP:
            stages = cut_stages(most_divisive_first([correctness for correctness, _ in answered[:WARM_UP]], n, 0))
        mine = Correctness(n)
        for stage in stages:
            mine = mine.adding((i, bool(correctness.right >> i & 1)) for i in stage)
            race.update(str(key), cost, mine)
            if not mine.is_complete and race.beaten_by(str(key)) is not None:
                break
        answers += mine.count
    best, found = (max(r.correctness[key].accuracy for key in r.complete()) for r in (full, race))
    return {
        "candidates": len(answered),
        "answered_fraction": answers / n / len(answered),
        "same_winner": race.winner() == full.winner(),
        "regret_points": 100 * (best - found),
    }


def simulated_races(races: int) -> dict[str, float]:
    found = {}
    for name, minimises_cost in (("accuracy_parameters", True), ("accuracy", False)):
        ended = [race_of_equals(minimises_cost, seed) for seed in range(races)]
        found[f"stopped_of_equals_{name}"] = statistics.fmean(race.equal_fraction for race in ended)
        found[f"stopped_better_{name}"] = statistics.fmean(race.better for race in ended)
    return found


def racing(results_dirs: Sequence[Path]) -> dict[str, Any]:
    """{super-adapter: {objectives: how its candidates race}} for those that answered everything."""
    found = {}
    for folder in (folder for results in results_dirs for folder in sorted((results / "candidates").iterdir())):
        known = [Candidate(**read_json(path)) for path in sorted(folder.glob("*.json"))]
        answered = [(Correctness.from_text(c.correctness), float(c.parameters)) for c in known if c.error is None]
        answered = [(correctness, cost) for correctness, cost in answered if correctness.is_complete]
        if len(answered) > WARM_UP:
            kinds = {"accuracy parameters": True, "accuracy": False}
            found[folder.name] = {name: raced(answered, costs) for name, costs in kinds.items()}
    return found


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS")
    chosen = parser.parse_args()
    sizes = SMOKE if chosen.smoke else Sizes()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scorer = warm_worker(Path(folder), toy("tiny-llama", chosen.smoke))
        values: dict[str, Any] = {"score_fraction": score_fraction(scorer)}
        values["worker_mb_20"], values[f"worker_mb_{sizes.candidates}"] = worker_mb(scorer, sizes.candidates)
    values["switch_fraction"] = switch_fraction(sizes)
    values |= {f"suggest_ms_{name}": suggest_ms(name, sizes.suggestions) for name in SAMPLERS}
    values |= simulated_races(sizes.races)
    for name, value in values.items():
        print(f"{name:36}{value:10.4f}")
    values["racing"] = racing(chosen.results)
    for name, by_objectives in values["racing"].items():
        for objectives, race in by_objectives.items():
            print(name, objectives, *(f"{key} {value:.3g}" for key, value in race.items()))
    print(json.dumps(values))


if __name__ == "__main__":
    main()
