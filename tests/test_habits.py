"""Habits: raises of versions are written down, types are shipped, checks before a commit are those of CI."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from test_imports import FILES, FOLDERS

from tune_sparse.data.synthetic import GENERATOR_VERSION
from tune_sparse.data.tasks import TASKS
from tune_sparse.identity import NUMERICS_VERSION
from tune_sparse.modes import MODES

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def raises(name: str, task: str | None = None) -> list[int]:
    """Read the versions of `name`, or of one task's `name`, that have a line in the changelog, the newest first."""
    found = re.findall(rf"^- `{name}` (\d+)(?: of ([\w,\s-]+?))?:", CHANGELOG, re.MULTILINE)
    return [int(version) for version, tasks in found if task is None or task in re.split(r",\s+", tasks)]


@pytest.mark.parametrize(
    ("name", "version"), [("NUMERICS_VERSION", NUMERICS_VERSION), ("GENERATOR_VERSION", GENERATOR_VERSION)]
)
def test_every_raise_of_a_version_has_its_line_in_the_changelog(name: str, version: int) -> None:
    assert raises(name) == list(range(version, 0, -1))


@pytest.mark.parametrize("mode", MODES)
def test_every_raise_of_a_mode_has_its_line_in_the_changelog(mode: str) -> None:
    assert raises("numerics", mode) == list(range(MODES[mode].numerics, 0, -1))


@pytest.mark.parametrize("task", TASKS)
def test_every_raise_of_a_prompt_version_has_its_line_in_the_changelog(task: str) -> None:
    assert raises("prompt_version", task) == list(range(TASKS[task].prompt_version, 0, -1))


def test_every_package_is_installed_with_its_types() -> None:
    packages = {Path(file).parent.as_posix().replace("/", ".") for file in FILES}
    assert set(SETUPTOOLS["packages"]) == packages
    for package in FOLDERS:
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in SETUPTOOLS["package-data"][package]


def test_hooks_before_a_commit_are_the_tools_of_the_environment() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    pinned = re.findall(
        r"^([\w.-]+)==", (ROOT / "cluster" / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert tools == {"ruff", "mypy"} <= set(pinned)


def test_hosted_ci_runs_make_test_on_the_python_that_is_required() -> None:
    [job] = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"].values()
    assert any(step.get("run", "").startswith("make test") for step in job["steps"])
    assert [step["with"]["python-version"] for step in job["steps"] if "python" in step.get("uses", "")] == ["3.11"]
