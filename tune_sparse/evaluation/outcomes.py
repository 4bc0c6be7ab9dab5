"""Predictions of a model, example by example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
    """choice: index of the likeliest choice. answer: the final answer found, if any."""
    correct: bool | None = None
    correct_norm: bool | None = None
    """choice: by log-likelihood per character of the continuation, as the harness's acc_norm."""
    correct_flexible: bool | None = None
    """answer: by the harness's flexible-extract."""
    log_likelihoods: tuple[float, ...] = ()
    """choice: of each choice. text: per token."""
    text: str | None = None
    """answer: what was generated."""
    truncated: bool | None = None
    """True if the start of the prompt was lost."""


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write a Parquet file with one column for each field of `Outcome`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {"log_likelihoods": pa.list_(pa.float64())}
    flags = dict.fromkeys(("correct", "correct_norm", "correct_flexible", "truncated"), pa.bool_())
    schema = pa.schema({f.name: (lists | flags).get(f.name, pa.string()) for f in fields(Outcome)})
    with atomic_file(path) as partial:
        pq.write_table(pa.Table.from_pylist([asdict(o) for o in outcomes], schema), partial, compression="zstd")


def read_outcomes(path: Path) -> list[Outcome]:
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    return [Outcome(**row | {"log_likelihoods": tuple(row["log_likelihoods"])}) for row in rows]
