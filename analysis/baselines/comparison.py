"""Published numbers beside ours: compared only where model, task, metric and few-shot setting agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.baselines.published import METRICS, Published
from analysis.stats.statistics import against_published
from tune_sparse.ledger.contracts import LedgerReader

SAME_SPARSITY = 0.005
NOT_AVAILABLE = "not available"


@dataclass(frozen=True)
class PublishedComparison:
    """A published number and the setting of ours that stands beside it, or why none does.

    `difference` is ours minus theirs, from `low` to `high` at 95% (`statistics.against_published`); a perplexity has no
    interval.
    """

    published: Published
    reason: str | None
    """why nothing is compared; None where something is"""
    value: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    our_setting: str = ""
    """method and mode of ours, and of how many settings it is the best"""
    run_ids: tuple[str, ...] = ()


def protocols(ledger: LedgerReader) -> dict[str, dict[str, Any]]:
    """{run_id: protocol} of every run that a sweep requested."""
    return {cell["run_id"]: sweep.config.get("protocol", {}) for sweep in ledger.sweeps() for cell in sweep.cells}


def compare_with_published(
    published: Iterable[Published], cells: pd.DataFrame, job_protocol: Mapping[str, Mapping[str, Any]]
) -> list[PublishedComparison]:
    """One comparison a published number, in their order. `cells` is the summary, `job_protocol` is by run_id."""
    done = cells[cells["status"] == "done"]
    protocol = [job_protocol.get(run_id, {}) for run_id in done["run_id"]]
    done = done.assign(
        model_key=done["model"].str.lower(),
        num_fewshot=pd.Series([known.get("num_fewshot") for known in protocol], done.index, object),
        context_tokens=pd.Series([known.get("max_tokens") for known in protocol], done.index, object),
    )
    return [_compared(row, done) for row in published]


def _compared(row: Published, done: pd.DataFrame) -> PublishedComparison:
    found, reason = _same_setting(row, done)
    if reason:
        return PublishedComparison(row, reason)
    assert row.value is not None
    value, examples, our_setting, run_ids = _nearest(row, found)
    if not row.metric.startswith("accuracy") or not examples > 0:
        return PublishedComparison(row, None, value, value - row.value, None, None, our_setting, run_ids)
    e = against_published(value, int(examples), row.value)
    return PublishedComparison(row, None, value, e.value, e.low, e.high, our_setting, run_ids)


def _same_setting(row: Published, done: pd.DataFrame) -> tuple[pd.DataFrame, str | None]:
    """Our cells that may stand beside a number, or the first reason why none may."""
    if row.value is None:
        return done, f"{NOT_AVAILABLE}: nobody has entered the number yet"
    if METRICS[row.metric].incomparable:
        return done, METRICS[row.metric].incomparable
    steps: list[tuple[str, Any, str]] = [
        ("model_key", row.model.lower(), f"no finished run of {row.model}"),
        ("task", row.task, f"no finished run of this model on {row.task}"),
        ("num_fewshot", row.num_fewshot, f"theirs is {row.num_fewshot}-shot, ours {{ours}}-shot"),
    ]
    if row.num_fewshot is None:
        steps[2] = ("num_fewshot", None, "the source does not state its few-shot setting")
    if row.metric.startswith("perplexity"):
        stated = f"theirs on windows of {row.context_tokens} tokens, ours of {{ours}}"
        stated = stated if row.context_tokens else "the source does not state the tokens of its windows"
        steps.append(("context_tokens", row.context_tokens, stated))
    for column, wanted, reason in steps:
        ours, done = done[column].unique(), done[done[column] == wanted]
        if done.empty:
            return done, reason.format(ours=" and ".join(map(str, ours)))
    if row.sparsity is None:
        return done, "the source does not state a sparsity"
    done = done[(done["sparsity"] - row.sparsity).abs() < SAME_SPARSITY]
    done = done[done[row.metric].notna()]
    return done, f"no finished run of ours at sparsity {row.sparsity:g}" if done.empty else None


def _nearest(row: Published, found: pd.DataFrame) -> tuple[float, float, str, tuple[str, ...]]:
    """The mean over seeds of the setting with their method and mode where we have it, of the best one otherwise."""
    for column, wanted in (("method", row.method), ("mode", row.mode)):
        same = found[found[column] == wanted]
        found = found if same.empty else same
    settings = found.groupby(["method", "mode"], sort=True)
    means = settings[[row.metric, "n_examples"]].mean()
    best: Any = means[row.metric].idxmin() if row.metric.startswith("perplexity") else means[row.metric].idxmax()
    chosen = means.loc[best]
    rivals = found["run_id"].nunique() > found["seed"].nunique()
    label = ", ".join(best) if row.sparsity else "dense"
    runs = tuple(dict.fromkeys(settings.get_group(best)["run_id"]))
    our_setting = label + (f", the best of {len(means)}" if rivals else "")
    return float(chosen[row.metric]), float(chosen["n_examples"]), our_setting, runs


def summary_sentence(comparisons: Sequence[PublishedComparison]) -> str:
    """Say how many numbers were compared."""
    compared = sum(comparison.reason is None for comparison in comparisons)
    missing = sum(comparison.published.value is None for comparison in comparisons)
    return (
        f"{compared} of {len(comparisons)} published numbers have a comparable run of ours; {missing} are not "
        "available, the others are not comparable, each with its reason."
    )
