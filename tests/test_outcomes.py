from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tune_sparse.data.task_types import METRICS
from tune_sparse.evaluation.outcomes import Outcome, read_outcomes, write_outcomes

EVERY_KIND = [
    Outcome("hellaswag", "ab" * 8, "3", "1", False, True, log_likelihoods=(-1.5, -0.1 - 0.2, -1e300, -5e-324)),
    Outcome(
        "gsm8k",
        "cd" * 8,
        "1200",
        exact_match_strict=False,
        exact_match_flexible=True,
        text=" ünï\n\u2028 \x00 1,200",
        truncated=True,
        cut=False,
    ),
    Outcome("wikitext2", "window 0", log_likelihoods=(-3.25,)),
]


@pytest.mark.parametrize("outcomes", [EVERY_KIND, EVERY_KIND[2:], EVERY_KIND * 1000, []])
def test_outcomes_are_read_as_they_were_written(tmp_path: Path, outcomes: list[Outcome]) -> None:
    write_outcomes(tmp_path / "examples.parquet", iter(outcomes))
    assert read_outcomes(tmp_path / "examples.parquet") == outcomes
    assert list(tmp_path.iterdir()) == [tmp_path / "examples.parquet"]


def test_columns_have_their_types_even_where_all_values_are_missing(tmp_path: Path) -> None:
    for outcomes in (EVERY_KIND, EVERY_KIND[2:]):
        write_outcomes(tmp_path / "examples.parquet", outcomes)
        types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "examples.parquet")}
        assert types == {
            **dict.fromkeys(("task", "id", "gold", "predicted", "text"), "string"),
            **dict.fromkeys((*METRICS[:-1], "truncated", "cut"), "bool"),
            "log_likelihoods": "list<element: double>",
        }


def test_a_thousand_outcomes_take_little_room(tmp_path: Path) -> None:
    """Most of it are the log-likelihoods: 3 x 8 bytes an example."""
    outcomes = [
        Outcome("hellaswag", f"{i:016x}", str(i % 4), "0", i % 4 == 0, True, log_likelihoods=(-i / 7, -i / 11, -i / 13))
        for i in range(1000)
    ]
    write_outcomes(tmp_path / "examples.parquet", outcomes)
    assert (tmp_path / "examples.parquet").stat().st_size < 64_000


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """A write beyond fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [[], EVERY_KIND])
def test_a_full_disk_leaves_the_old_file_or_none(tmp_path: Path, old: Sequence[Outcome]) -> None:
    path = tmp_path / "examples.parquet"
    if old:
        write_outcomes(path, old)
    before = list(tmp_path.iterdir())
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        write_outcomes(path, EVERY_KIND * 1000)
    assert list(tmp_path.iterdir()) == before
    assert not old or read_outcomes(path) == old


def test_a_failing_rename_leaves_the_old_file_and_no_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    path = tmp_path / "examples.parquet"
    write_outcomes(path, EVERY_KIND)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_outcomes(path, EVERY_KIND[:1])
    assert list(tmp_path.iterdir()) == [path]
    assert read_outcomes(path) == EVERY_KIND
