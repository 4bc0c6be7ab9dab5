"""A mode states its own facts: nobody else asks for it by its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tune_sparse.config import SweepConfig
from tune_sparse.modes import ADAPTER_MODES, DENSE, MODES, SPARSE_ADAPTER_MODES

ROOT = Path(__file__).parents[1]
FOLDERS = ("tune_sparse", "search_spaces", "trainables", "analysis")
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TABLES = {"tune_sparse/modes.py", "analysis/report/style.py"}
"""Where each mode has an entry: its facts, and its line style."""
DEFAULTS = {"tune_sparse/cli/search.py", "search_spaces/matrix.py"}


def test_the_facts_by_hand() -> None:
    assert tuple(MODES) == ("dense", "sparse-to-dense", "sparse-to-sparse", "masked-finetuning")
    facts = {name: (m.is_pruned, m.has_adapter, m.masks_update, m.masks_at_merge) for name, m in MODES.items()}
    assert facts == {
        "dense": (False, True, False, False),
        "sparse-to-dense": (True, True, False, True),
        "sparse-to-sparse": (True, True, True, False),
        "masked-finetuning": (True, False, False, False),
    }
    assert DENSE == "dense"
    assert ADAPTER_MODES == ("dense", "sparse-to-dense", "sparse-to-sparse")
    assert SPARSE_ADAPTER_MODES == ("sparse-to-dense", "sparse-to-sparse") == SweepConfig(("tiny-llama",)).modes


def compared(tree: ast.AST) -> Iterator[ast.expr]:
    """Every side of every comparison, and every pattern of a `match`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, ast.MatchValue):
            yield node.value


def mode_names(side: ast.expr) -> list[str]:
    """The modes that one side of a comparison names: alone, or among the items of a tuple, list or set."""
    items = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
    literals = [item.value for item in items if isinstance(item, ast.Constant) and item.value in MODES]
    return literals + [item.id for item in items if isinstance(item, ast.Name) and item.id == "DENSE"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("cell.mode != 'dense'", ["dense"]),
        ("'masked-finetuning' in modes", ["masked-finetuning"]),
        ("{a, b} == {'sparse-to-dense', 'sparse-to-sparse'}", ["sparse-to-dense", "sparse-to-sparse"]),
        ("mode is DENSE", ["DENSE"]),
        ("match mode:\n    case 'dense': pass", ["dense"]),
        ("mode = 'dense' if facts.has_adapter else mode", []),
        ("row['dense'] < 1", []),
    ],
)
def test_a_comparison_is_found(source: str, found: list[str]) -> None:
    assert [name for side in compared(ast.parse(source)) for name in mode_names(side)] == found


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_source_compares_with_the_name_of_a_mode(folder: str) -> None:
    files = [file for file in FILES if file.startswith(f"{folder}/")]
    assert files
    for file in files:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert [name for side in compared(tree) for name in mode_names(side)] == [], file


def test_modes_are_named_in_tables_alone() -> None:
    """But for "dense", which has other meanings too."""
    naming = set()
    for file in FILES:
        nodes = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if any(isinstance(node, ast.Constant) and node.value in {*MODES} - {DENSE} for node in nodes):
            naming.add(file)
    assert TABLES <= naming <= TABLES | DEFAULTS
