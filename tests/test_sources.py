"""Examples of the Hub: fetched once, whole or not at all, through the real `datasets` from a dataset that lies here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from factories import boolq_examples, write_jsonl

from tune_sparse.config import HUB, SYNTHETIC, Protocol
from tune_sparse.data import sources
from tune_sparse.data.sources import examples_folder, fetch_examples
from tune_sparse.data.splits import load_splits, read_split
from tune_sparse.data.task_types import Hub
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.files import cache_dir

LINES = ["", " = A title = \n", "", " It is a line of text . \n"]


@pytest.fixture(autouse=True)
def own_cache_of_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset folder in place of the Hub's boolq."""
    folder = tmp_path / "hub"
    write_jsonl(folder / "train.jsonl", boolq_examples(20, "train"))
    write_jsonl(folder / "validation.jsonl", boolq_examples(6, "validation"))
    monkeypatch.setitem(TASKS, "boolq", replace(TASKS["boolq"], hub=Hub(str(folder))))
    return folder


@pytest.mark.usefixtures("hub")
def test_examples_of_the_hub_are_those_of_its_dataset() -> None:
    folder = examples_folder(HUB, ["boolq"])
    assert read_split(TASKS["boolq"], "train", folder) == boolq_examples(20, "train")
    splits = load_splits(TASKS["boolq"], folder, Protocol(n_selection=4))
    assert (len(splits.train), len(splits.selection), len(splits.test)) == (16, 4, 6)


def test_examples_are_fetched_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    fetch_examples(["boolq"], reported.append)
    monkeypatch.setattr(sources, "_fetch_splits", lambda *_: pytest.fail("fetched again"))
    assert fetch_examples(["boolq"], reported.append) == cache_dir() / "hub_examples"
    assert [line.split(":")[0] for line in reported] == ["boolq"]


def test_the_tasks_of_a_mixture_are_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "piqa", replace(TASKS["piqa"], hub=Hub(str(hub))))
    folder = fetch_examples(["boolq+piqa"])
    assert {path.name for path in folder.iterdir()} == {"boolq", "piqa"}


def test_a_text_of_the_hub_reads_as_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "text" / f"{split}.jsonl", [{"text": line} for line in LINES])
    monkeypatch.setitem(TASKS, "wikitext2", replace(TASKS["wikitext2"], hub=Hub(str(tmp_path / "text"))))
    folder = fetch_examples(["wikitext2"])
    assert {path.name for path in (folder / "wikitext2").iterdir()} == {"train.txt", "valid.txt", "test.txt"}
    assert read_split(TASKS["wikitext2"], "test", folder) == [{"text": "\n\n".join(LINES)}]


def test_a_dataset_without_the_scored_split_is_refused_and_leaves_nothing(hub: Path) -> None:
    (hub / "validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"boolq needs the splits train and validation, .+ lacks validation"):
        fetch_examples(["boolq"])
    assert not list((cache_dir() / "hub_examples").glob("*"))


def test_a_hub_out_of_reach_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "boolq", replace(TASKS["boolq"], hub=Hub(str(tmp_path / "nowhere"))))
    with pytest.raises(NotReadyError, match="Run `tune-sparse prepare --tasks boolq --data-dir hub` where there is"):
        examples_folder(HUB, ["boolq"])


def test_a_task_that_the_hub_has_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"the Hub has no dataset with the fields of mawps\. Give --data-dir FOLDER"):
        examples_folder(HUB, ["mawps"])


def test_no_examples_are_ever_a_default() -> None:
    with pytest.raises(NotReadyError, match="examples of the tasks are needed, got no data_dir"):
        examples_folder(None, ["boolq"])
    assert examples_folder(SYNTHETIC, ["boolq"]) is None
