from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tune_sparse.errors import InputError
from tune_sparse.files import (
    aside,
    atomic_file,
    atomic_folder,
    cache_dir,
    check_room,
    read_json,
    write_json,
    write_lines,
    write_text,
)


@pytest.fixture
def no_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renames fail, as on a full or lost disk."""

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    write_text(path, "ünï\n")
    assert path.read_text(encoding="utf-8") == "ünï\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("no_replace")
def test_a_failing_write_leaves_the_old_file_and_no_partial(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text.txt", "\ud800")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"loss": [float("-inf")]}])
def test_a_number_that_is_not_finite_is_refused_and_leaves_the_old_file(tmp_path: Path, value: object) -> None:
    path = tmp_path / "result.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_json(path, value)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_lines(path, [1, value])
    assert read_json(path) == 1


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"name": "é", "loss": 0.1, "count": 3, "missing": None, "list": [True]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value


def test_lines_hold_one_value_each(tmp_path: Path) -> None:
    values = [{"text": "a\nb"}, [1, 2], None]
    write_lines(tmp_path / "values.jsonl", iter(values))
    lines = (tmp_path / "values.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == values


def test_a_file_has_its_name_once_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def fail_half_way(block: AbstractContextManager[Path], file: str = "") -> None:
    with block as partial:
        (partial / file).write_text("half")
        raise RuntimeError("boom")


def test_a_file_whose_block_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way(atomic_file(tmp_path / "model.pt"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    return folder


def test_a_folder_has_its_name_once_the_block_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    with atomic_folder(folder) as partial:
        (partial / "weights").write_text("1")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_whose_block_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way(atomic_folder(tmp_path / "model"), "weights")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_stays_unless_it_is_replaced(tmp_path: Path, old_folder: Path) -> None:
    with pytest.raises(OSError, match="not empty"), atomic_folder(old_folder) as partial:
        (partial / "new").touch()
    assert [path.name for path in old_folder.iterdir()] == ["old"]
    with atomic_folder(old_folder, replaces=True) as partial:
        (partial / "new").touch()
    assert [path.name for path in old_folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [old_folder]


def test_names_aside_are_hidden_beside_the_file_and_never_the_same(tmp_path: Path) -> None:
    names = {aside(tmp_path / "x.json") for _ in range(10)}
    assert len(names) == 10
    assert all(path.parent == tmp_path and path.match(".x.json.*.partial") for path in names)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TUNE_SPARSE_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "tune-sparse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "tune-sparse"


def test_room_is_asked_for_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path, 1000, "a test", "Free some.")
    lacking = rf"^a test needs room .+, about 1000000000\.00 GB, {tmp_path} has \d+\.\d\d GB\. Free some\.$"
    with pytest.raises(InputError, match=lacking):
        check_room(tmp_path, 10**18, "a test", "Free some.")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "fallocate").write_text('#!/bin/sh\necho "fallocate: $3: Disk quota exceeded" >&2; exit 1\n')
    (tmp_path / "fallocate").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(InputError, match=r"about 0\.00 GB, .+ refuses it: Disk quota exceeded\. Free some\."):
        check_room(tmp_path, 1000, "a test", "Free some.")
