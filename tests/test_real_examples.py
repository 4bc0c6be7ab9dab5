"""The real examples in tests/data: every task has some, whose licence and source are named, and they stay small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tune_sparse.data.tasks import TASKS


def test_every_task_has_real_examples_and_no_other_folder_is_there(real_examples: Path) -> None:
    assert {path.name for path in real_examples.iterdir() if path.is_dir()} == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_licence_and_source_of_real_examples_are_named(name: str, real_examples: Path) -> None:
    text = (real_examples / "README.md").read_text(encoding="utf-8")
    [(licence, source)] = re.findall(rf"^\| {name} \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    assert re.match(r"CC BY|MIT|AFL|Apache|public domain", licence)
    assert re.search(r"`[\w.-]+/[\w.-]+` (@ `[0-9a-f]{40}`|\(as boolq\))", source)


def test_real_examples_are_small(real_examples: Path) -> None:
    assert sum(path.stat().st_size for path in real_examples.rglob("*") if path.is_file()) < 1_000_000
