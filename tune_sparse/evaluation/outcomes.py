"""Predictions of a model, example by example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tune_sparse.data.task_types import METRICS
from tune_sparse.files import atomic_file


@dataclass(frozen=True)
class Outcome:
    """One scored example: a question, or a window of a text."""

    task: str
    id: str
    """Identifies the question, in every run that asks it."""
    gold: str | None = None
    """choice: index of the right choice. answer: the right final answer."""
    predicted: str | None = None
    """choice: index of the likeliest choice. answer: the final answer found, if any, by the strictest metric."""
    acc: bool | None = None
    """choice: the likeliest is right"""
    acc_norm: bool | None = None
    """choice: by log-likelihood per character of the continuation"""
    exact_match_strict: bool | None = None
    """answer: by the harness's strict-match"""
    exact_match_flexible: bool | None = None
    """answer: by the harness's flexible-extract"""
    log_likelihoods: tuple[float, ...] = ()
    """choice: of each choice. text: per token."""
    text: str | None = None
    """answer: what was generated."""
    truncated: bool | None = None
    """True if the start of the prompt was lost."""
    cut: bool | None = None
    """answer: True if the limit ended it, before the model did."""

    def is_right(self, metric: str) -> bool:
        """By one of the metrics of its task, but perplexity."""
        return bool(getattr(self, metric))


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write a Parquet file with one column for each field of `Outcome`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {"log_likelihoods": pa.list_(pa.float64())}
    flags = dict.fromkeys((*METRICS[:-1], "truncated", "cut"), pa.bool_())
    schema = pa.schema({f.name: (lists | flags).get(f.name, pa.string()) for f in fields(Outcome)})
    with atomic_file(path) as partial:
        pq.write_table(pa.Table.from_pylist([asdict(o) for o in outcomes], schema), partial, compression="zstd")


def read_outcomes(path: Path) -> list[Outcome]:
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    return [Outcome(**row | {"log_likelihoods": tuple(row["log_likelihoods"])}) for row in rows]
