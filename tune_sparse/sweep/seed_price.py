"""The price of more seeds: one seed describes its trainings, several judge models and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from analysis.stats.scopes import FEWEST_SEEDS
from tune_sparse.config import SweepConfig
from tune_sparse.evaluation.cards import Card
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.sweep.estimate import KindEstimate, Sizes, estimate
from tune_sparse.sweep.forecast import forecast
from tune_sparse.sweep.plan import Plan, trained_points
from tune_sparse.sweep.progress import duration


@dataclass(frozen=True)
class SeedPrice:
    """What one more seed takes, all cells of it."""

    seeds: int
    """that the sweep has"""
    runs: int
    measured_runs: int
    """Those of the runs whose seconds are known from measured ones."""
    device_seconds: Mapping[str, float]
    """{CPU, GPU or CS-3: seconds} of the measured runs"""
    card_seconds: Mapping[str, float]
    """{card: seconds on a whole one, by the formula}, for the cards that hold every run"""

    def lines(self) -> list[str]:
        """For people."""
        more = FEWEST_SEEDS - self.seeds
        if more <= 0:
            return [f"Seeds: {self.seeds}, enough to judge these models and tasks. One more takes {self._price(1)}"]
        lines = [
            f"Seeds: {self.seeds}, so only these trainings are described; {FEWEST_SEEDS} judge these models and tasks.",
            f"  1 more takes {self._price(1)}",
        ]
        return lines + [f"  {more} more, {FEWEST_SEEDS} in all, take {self._price(more)}"][: more - 1]

    def _price(self, seeds: int) -> str:
        partly = f" for {seeds * self.measured_runs} of them" if self.measured_runs < self.runs else ""
        hours = [f"{seeds * s / 3600:.3g} {kind}-hours{partly}" for kind, s in self.device_seconds.items() if s]
        cards = [f"{duration(seeds * seconds)} on one {card}" for card, seconds in self.card_seconds.items()]
        return ", ".join([f"{seeds * self.runs} runs", *hours, *cards])


def seed_price(
    config: SweepConfig, sizes: Sizes, cards: Sequence[Card], plan: Plan | None, ledger: LedgerReader
) -> SeedPrice:
    """plan: None for a sweep that is not ready, of which nothing was measured."""
    cells = trained_points(replace(config, seeds=config.seeds[:1]))
    card_seconds = _card_seconds(estimate(config, cells, sizes, cards), len(cells))
    if plan is None:
        return SeedPrice(len(config.seeds), len(cells), 0, {}, card_seconds)
    runs = [run for run in plan.runs.values() if run.cell.seed == config.seeds[0]]
    expected = forecast(plan, ledger, runs)
    seconds = {"CPU": expected.cpu_seconds, "GPU": expected.gpu_seconds, "CS-3": expected.cs3_seconds}
    return SeedPrice(len(config.seeds), len(cells), sum(expected.by_group.values()), seconds, card_seconds)


def _card_seconds(found: Sequence[KindEstimate], runs: int) -> dict[str, float]:
    """{card: seconds of all runs}, for the cards that hold them all."""
    by_card = {card: [kind for kind in found if kind.card == card] for card in {kind.card: None for kind in found}}
    return {
        card: sum(kind.seconds or 0.0 for kind in kinds)
        for card, kinds in by_card.items()
        if sum(kind.runs for kind in kinds if kind.seconds is not None) == runs
    }
