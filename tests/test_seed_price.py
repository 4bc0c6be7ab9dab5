"""Runs and hours of one more seed, by the formula and by measured runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune_sparse.config import SweepConfig
from tune_sparse.evaluation.cards import CARDS
from tune_sparse.evaluation.published import LLAMA_2_7B, TASKS
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.sweep.estimate import Sizes, estimate
from tune_sparse.sweep.plan import distinct_trainings, trained_points
from tune_sparse.sweep.seed_price import SeedPrice, seed_price

SIZES = Sizes({"Llama-2-7b-hf": LLAMA_2_7B}, TASKS)
CARDS_ASKED = [CARDS["H100-80"], CARDS["T4"]]


@pytest.mark.parametrize("seeds", [(0,), (4, 5)])
def test_a_seed_costs_what_the_sweep_of_one_seed_costs(seeds: tuple[int, ...], tmp_path: Path) -> None:
    config = SweepConfig(models=("a/Llama-2-7b-hf",), seeds=seeds)
    price = seed_price(config, SIZES, CARDS_ASKED, None, Ledger(tmp_path))
    assert (price.seeds, price.runs) == (len(seeds), distinct_trainings(config) / len(seeds)) == (len(seeds), 165)
    found = estimate(config, trained_points(config), SIZES, CARDS_ASKED[:1])
    assert price.card_seconds == {"H100-80": pytest.approx(sum(kind.seconds or 0 for kind in found) / len(seeds))}


def test_without_sizes_the_runs_alone_are_priced(tmp_path: Path) -> None:
    config = SweepConfig(models=("a/unheard-of", "a/Llama-2-7b-hf"))
    price = seed_price(config, SIZES, CARDS_ASKED, None, Ledger(tmp_path))
    assert (price.runs, price.card_seconds) == (330, {})


def test_the_lines_say_what_the_seeds_are_good_for() -> None:
    one = SeedPrice(1, 10, 10, {"CPU": 3600.0, "GPU": 0.0}, {"H200": 7200.0}).lines()
    assert one == [
        "Seeds: 1, so only these trainings are described; 3 judge these models and tasks.",
        "  1 more takes 10 runs, 1 CPU-hours, 2 h on one H200",
        "  2 more, 3 in all, take 20 runs, 2 CPU-hours, 4 h on one H200",
    ]
    assert len(SeedPrice(2, 10, 10, {}, {}).lines()) == 2
    assert SeedPrice(3, 10, 4, {"CPU": 3600.0}, {}).lines() == [
        "Seeds: 3, enough to judge these models and tasks. One more takes 10 runs, 1 CPU-hours for 4 of them"
    ]
