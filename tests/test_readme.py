"""What the README shows exists: its files, its commands, its settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from search_spaces.matrix import PRESETS
from tune_sparse.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@each_page
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert local or page != ROOT / "README.md"
    assert [target for target in local if not (page.parent / target).exists()] == []


@each_page
def test_every_command_that_is_shown_parses(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^ *\.venv/bin/tune-sparse (.+?)(?: \\\n *(.+))?$", text, flags=re.MULTILINE)
    assert len(lines) >= 8 or page != ROOT / "README.md"
    for line in lines:
        arguments = shlex.split(" ".join(line), comments=True)
        if "--help" not in arguments:
            parser().parse_args(arguments)


def test_every_preset_is_explained() -> None:
    explained = [name for name in PRESETS if "pilot" not in name]
    assert [name for name in explained if f"`{name}`" not in README] == []
