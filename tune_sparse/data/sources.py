"""Sources of examples: a folder, the Hugging Face Hub (fetched once into files), or the synthetic generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tune_sparse.config import HUB, SYNTHETIC
from tune_sparse.data.splits import split_path
from tune_sparse.data.task_types import Hub, Task, TextTask
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.files import atomic_folder, cache_dir, write_lines, write_text


def examples_folder(data_dir: Path | None, tasks: Sequence[str]) -> Path | None:
    """The folder of the examples of `tasks` (names or mixtures); None for the synthetic generator.

    Examples of the Hub are fetched if they are not here yet. Raises `NotReadyError` where that is not possible.
    """
    if data_dir is None:
        raise NotReadyError(
            "examples of the tasks are needed, got no data_dir. "
            f"Set it (--data-dir) to a folder that has them, to {HUB}, or to {SYNTHETIC} for generated ones."
        )
    if data_dir == SYNTHETIC:
        return None
    return fetch_examples(tasks) if data_dir == HUB else data_dir.expanduser().resolve()


def fetch_examples(names: Iterable[str], report: Callable[[str], None] = lambda text: None) -> Path:
    """Bring the examples of tasks from the Hub into the cache, if they are not there. Returns `data_dir`.

    Raises `InputError` for a task that the Hub has not, `NotReadyError` where it cannot be reached.
    """
    folder = cache_dir() / "hub_examples"
    for task in (task for name in names for task in tasks_named(name)):
        if task.hub is None:
            raise InputError(
                f"the Hub has no dataset with the fields of {task.name}. Give --data-dir FOLDER with its examples."
            )
        if not (folder / task.name).is_dir():
            _fetch(task, task.hub, folder)
            report(f"{task.name}: {folder / task.name}")
    return folder


def _fetch(task: Task, hub: Hub, folder: Path) -> None:
    """All splits or none."""
    splits = _fetch_splits(task, hub)
    missing = {"train", task.test_split} - splits.keys()
    if missing:
        raise InputError(f"{task.name} needs the splits train and {task.test_split}, {hub.path} lacks {min(missing)}.")
    with atomic_folder(folder / task.name) as partial:
        for split in {"train", "validation", task.test_split} & splits.keys():
            path = partial / split_path(task, split, folder).name
            if isinstance(task, TextTask):
                write_text(path, "".join(example["text"] or "\n" for example in splits[split]))
            else:
                write_lines(path, splits[split])


def _fetch_splits(task: Task, hub: Hub) -> Any:
    """{split: examples}"""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(hub.path, hub.config)
    except (OSError, ValueError) as error:
        raise NotReadyError(
            f"the examples of {task.name} must be on this machine, or {hub.path} within reach: "
            f"{type(error).__name__}: {error}. Run `tune-sparse prepare --tasks {task.name} --data-dir {HUB}` "
            "where there is a network, or give --data-dir FOLDER."
        ) from error
