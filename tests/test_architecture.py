"""docs/architecture.md is true: its picture is the order of imports, its lines are the modules."""

from __future__ import annotations

import re
from pathlib import Path

from test_imports import FILES, LEVELS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURE, MODULES = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:3]
LINES = re.findall(r"^(\S+) \| (.+)$", MODULES, re.MULTILINE)


def full_name(shown: str) -> str:
    """Name a folder or module of the picture in full: a name without its package is of tune_sparse."""
    top_level = shown.split(".")[0] in ("analysis", "search_spaces", "trainables")
    return shown if top_level else f"tune_sparse.{shown}"


def test_the_picture_shows_the_order_of_imports() -> None:
    rows = PICTURE.split("```")[1].strip().splitlines()
    shown = [{full_name(name) for name in re.split(r" {5,}", row)[0].split()} for row in rows]
    assert shown == list(reversed(LEVELS))


def test_every_module_has_one_line() -> None:
    modules = [file for file in FILES if not file.endswith("__init__.py")]
    assert len(modules) >= 100
    assert sorted(path for path, _ in LINES if path.endswith(".py")) == sorted(modules)


def test_every_line_leads_to_a_file() -> None:
    assert [path for path, _ in LINES if not (ROOT / path).is_file()] == []
    assert len({path for path, _ in LINES}) == len(LINES)


def test_every_line_lies_under_its_folder_in_the_order_of_the_alphabet() -> None:
    for folder, own in re.findall(r"^### `(\S+)`: [^\n]+\n+```\n([^`]*)```", MODULES, re.MULTILINE):
        paths = [line.split(" | ")[0] for line in own.splitlines()]
        assert paths == sorted(paths), folder
        assert {Path(path).parent.as_posix().removesuffix("/templates") for path in paths} == {folder}


def test_the_readme_has_a_line_for_every_folder() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The files")[1].split("```")[1]
    folders = {path.parent.name for path in map(Path, FILES)}
    shown = re.findall(r"^ *(\w+)/ ", tree, re.MULTILINE)
    assert folders <= set(shown)
    assert len(shown) == len(set(shown))
