"""Published numbers beside ours: compared only where both were measured in the same way on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.baselines.published import METRICS, TRAININGS, Published, find_conflicts, our_metric
from analysis.read.seeds import CURVE, schedule_in, shown_columns
from analysis.stats.many_settings import Spread, interval_among, pooled_spread
from analysis.stats.scopes import FEWEST_SEEDS
from tune_sparse.config import SYNTHETIC
from tune_sparse.data.tasks import TASKS
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.schedules import SCHEDULES

SAME_SPARSITY = 0.005
NOT_AVAILABLE = "not available"


@dataclass(frozen=True)
class PublishedComparison:
    """A published number and a setting of ours that stands beside it, or why none does.

    `difference` is ours minus theirs, `low` and `high` the ends of `interval_among`; a perplexity has none.
    """

    published: Published
    reason: str | None
    """why nothing is compared; None where something is"""
    value: float | None = None
    """the mean over seeds"""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    our_setting: str = ""
    """method and mode of ours"""
    seeds: int = 0
    settings: int = 0
    """how many of ours are compared with this number: the intervals hold for all of them at once"""
    run_ids: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """The setting, and for what the interval holds."""
        seeds = "one seed: these trainings" if self.seeds == 1 else f"mean of {self.seeds} seeds"
        among = f", one of {self.settings} settings, interval corrected for all" if self.settings > 1 else ""
        return f"{self.our_setting}, {seeds}{among}"

    @property
    def verdict(self) -> str:
        """Whether ours is higher or lower than theirs; empty where the seeds are too few to say."""
        if self.low is None or self.high is None or self.seeds < FEWEST_SEEDS:
            return ""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not told apart"


def protocols(ledger: LedgerReader) -> dict[str, dict[str, Any]]:
    """{run_id: protocol, and data_dir} of every run that a sweep requested."""
    return {
        cell["run_id"]: sweep.config.get("protocol", {}) | {"data_dir": sweep.config.get("data_dir")}
        for sweep in ledger.sweeps()
        for cell in sweep.cells
    }


def compare_with_published(
    published: Iterable[Published], cells: pd.DataFrame, job_protocol: Mapping[str, Mapping[str, Any]]
) -> list[PublishedComparison]:
    """The comparisons of each published number, in their order: one a setting of ours, or one that says why none.

    `cells` is the summary, `job_protocol` is by run_id. Their method and mode stand alone beside a number where we
    have them; otherwise every setting of ours does, and none is picked for its result.
    """
    published = list(published)
    conflicts = find_conflicts(published)
    done = cells[cells["status"] == "done"]
    protocol = [job_protocol.get(run_id, {}) for run_id in done["run_id"]]
    known = {
        name: pd.Series([settings.get(key) for settings in protocol], done.index, object)
        for name, key in (("num_fewshot", "num_fewshot"), ("context_tokens", "max_tokens"), ("n_test", "n_test"))
    }
    unreal = [settings.get("data_dir") in (None, str(SYNTHETIC)) for settings in protocol]
    known["is_synthetic"] = pd.Series(unreal, done.index, bool)
    done = done.assign(model_key=done["model"].str.lower(), **known)
    return [found for row in published for found in _compared(row, done, conflicts.get(row, ()))]


def _compared(row: Published, done: pd.DataFrame, conflicts: Sequence[Published]) -> Iterator[PublishedComparison]:
    reason = _reason_of_source(row, conflicts)
    if reason is None:
        done, reason = _same_setting(row, done)
    if reason:
        yield PublishedComparison(row, reason)
        return
    settings = [(label, runs, runs.groupby("seed")[our_metric(row)].mean()) for label, runs in _settings(row, done)]
    spread = pooled_spread([by_seed.tolist() for _, _, by_seed in settings])
    for label, runs, by_seed in settings:
        yield _beside(PublishedComparison(row, None, our_setting=label, settings=len(settings)), runs, by_seed, spread)


def _reason_of_source(row: Published, conflicts: Sequence[Published]) -> str | None:
    """Why no run whatever could stand beside a number; None where one could."""
    if row.value is None:
        return f"{NOT_AVAILABLE}: nobody has entered the number yet"
    if conflicts:
        others = " and ".join(f"{other.value:g} ({other.table})" for other in conflicts)
        return f"its source contradicts itself: {row.value:g} ({row.table}), but {others}"
    if METRICS[row.metric].incomparable:
        return METRICS[row.metric].incomparable
    if row.num_fewshot is None:
        return "the source does not state its few-shot setting"
    if row.metric == "perplexity" and row.context_tokens is None:
        return "the source does not state the tokens of its windows"
    if not row.training:
        return "the source does not state what was trained on"
    if row.training == "other":
        return f"theirs was {TRAININGS['other']}; ours on the task alone"
    return "the source does not state a sparsity" if row.sparsity is None else None


def _same_setting(row: Published, done: pd.DataFrame) -> tuple[pd.DataFrame, str | None]:
    """Our cells that may stand beside a number, or the first reason why none may."""
    steps: list[tuple[Callable[[pd.DataFrame], Any], str]] = [
        (lambda d: d["model_key"] == row.model.lower(), f"no finished run of {row.model}"),
        (lambda d: d["task"] == row.task, f"no finished run of this model on {row.task}"),
        (lambda d: d["num_fewshot"] == row.num_fewshot, f"theirs is {row.num_fewshot}-shot, ours {{num_fewshot}}-shot"),
        (lambda d: _all_examples(row.task, d), _examples_reason(row.task)),
    ]
    if row.metric == "perplexity":
        stated = f"theirs on windows of {row.context_tokens} tokens, ours of {{context_tokens}}"
        steps.append((lambda d: d["context_tokens"] == row.context_tokens, stated))
    steps += [
        (
            lambda d: (d["sparsity"] - (row.sparsity or 0.0)).abs() < SAME_SPARSITY,
            f"no finished run at {row.sparsity:g}",
        ),
        (lambda d: d[our_metric(row)].notna(), f"our runs have no {our_metric(row)}"),
        (lambda d: d["comparable"].astype(bool), "ours was run because of other results (`--find`, `--budget`)"),
    ]
    if row.training == "none" and row.sparsity:
        starts = "our trainings began with every weight"
        steps.append((lambda d: ~d["schedule"].map(_starts_dense).astype(bool), starts))
    if our_metric(row) not in done:
        return done, f"our runs have no {our_metric(row)}"
    for agrees, reason in steps:
        before, done = done, done[agrees(done)]
        if done.empty:
            named = {name: " and ".join(f"{v:g}" for v in before[name].dropna().unique()) for name in _NAMED}
            return done, reason.format(**named)
    return done, None


def _starts_dense(schedule: str) -> bool:
    return SCHEDULES[schedule_in(schedule)].starts_dense


_NAMED = ("num_fewshot", "context_tokens", "n_examples")


def _all_examples(task: str, done: pd.DataFrame) -> Any:
    """Which cells were scored on the whole test split, not on a sample of it or on synthetic examples."""
    count = _test_examples(task)
    return done["n_examples"] == count if count else done["n_test"].isna() & ~done["is_synthetic"]


def _examples_reason(task: str) -> str:
    count = _test_examples(task)
    return f"theirs on all {count} test examples, ours on {{n_examples}}" if count else "ours not on all test examples"


def _test_examples(names: str) -> int | None:
    """How many test examples a task, or a mixture, has; None where that is not known."""
    counts = [TASKS[name].test_examples if name in TASKS else None for name in names.split("+")]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _settings(row: Published, found: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(what it is, its runs) of each setting to compare: theirs alone where we have it. What was not tuned has no
    mode, and at 0% there is no method."""
    keys = [] if not row.sparsity else ["method"] if row.training == "none" else shown_columns(CURVE, found)
    for key in keys[:2]:
        same = found[found[key] == getattr(row, key)]
        found = found if same.empty else same
    end = ["before tuning"] if row.training == "none" else []
    for names, runs in found.groupby(keys, sort=True) if keys else [(("dense",), found)]:
        yield ", ".join([*map(str, names), *end]), runs.drop_duplicates("run_id")


def _beside(
    comparison: PublishedComparison, runs: pd.DataFrame, by_seed: pd.Series[float], spread: Spread
) -> PublishedComparison:
    theirs, ours, low, high = comparison.published.value, float(by_seed.mean()), None, None
    assert theirs is not None
    if comparison.published.metric != "perplexity":
        count = int(runs["n_examples"].iloc[0])
        low, high = interval_among(ours, theirs, count, len(by_seed), spread, comparison.settings)
    return replace(
        comparison,
        value=ours,
        difference=ours - theirs,
        low=low,
        high=high,
        seeds=len(by_seed),
        run_ids=tuple(runs["run_id"]),
    )


def summary_sentence(comparisons: Sequence[PublishedComparison], rates: str) -> str:
    """Say how many numbers were compared. rates: how the learning rate of ours was set."""
    numbers = {id(comparison.published): comparison for comparison in comparisons}.values()
    compared = sum(comparison.reason is None for comparison in numbers)
    missing = sum(comparison.published.value is None for comparison in numbers)
    return (
        f"{compared} of {len(numbers)} published numbers have a comparable run of ours; {missing} are not "
        "available, the others are not comparable, each with its reason. "
        f"Ours are {rates}."
    )
