"""How a model is scored where it says so itself: as the run was whose merged model it is, or as toy models are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search_spaces.matrix import TOY_MODELS
from tune_sparse.config import Protocol, SweepConfig
from tune_sparse.config.options import value_text
from tune_sparse.config.presets import DEFAULT_PRESET
from tune_sparse.config.protocol import SCORING
from tune_sparse.data.task_types import Task
from tune_sparse.errors import InputError
from tune_sparse.files import read_json
from tune_sparse.identity import hash_json

MERGED_FILE = "tune_sparse_merge.json"
"""In the folder of a merged model: where it came from, and how it was scored."""
OF_THE_MODEL = ("precision", "threads")
"""The settings of scoring that hold for every task."""


@dataclass(frozen=True)
class ScoredAs:
    """The settings that gave a model its scores."""

    origin: str
    """the name of a run or preset, with that word"""
    settings: Mapping[str, Any]
    """{each of `SCORING`: its value}"""
    data_dir: str
    """`synthetic` for generated examples"""
    tasks: tuple[str, ...] = ()
    """The tasks that were scored so; for others the defaults hold. Empty: every task."""
    examples: Mapping[str, str] | None = None
    """{task: hash of the test examples}, where they are known"""

    def covers(self, task: Task) -> bool:
        return not self.tasks or task.name in self.tasks

    def settings_of(self, task: Task) -> dict[str, Any]:
        """The settings by which a task is scored unless a user sets others."""
        if self.covers(task):
            return dict(self.settings)
        return {"num_fewshot": task.num_fewshot} | {name: self.settings[name] for name in OF_THE_MODEL}

    def note(self, task: Task, used: Mapping[str, Any], given: Mapping[str, Any], data_dir: str) -> str:
        """What a user is told of the settings in use.

        used: each of `SCORING`, its value. given: those that the user set. data_dir: a folder, or `synthetic`.
        """
        in_use = ", ".join(f"{name} {value_text(used[name])}" for name in SCORING) + f", examples of {data_dir}"
        if not self.covers(task):
            return f"{task.name} is no task of {self.origin}, so it has the defaults of `evaluate`: {in_use}"
        own = {**self.settings, "data_dir": self.data_dir}
        changed = {name: value for name, value in {**given, "data_dir": data_dir}.items() if value != own[name]}
        if not changed:
            return f"{task.name} is scored as by {self.origin}: {in_use}"
        texts = (f"{name} {value_text(value)} (there {value_text(own[name])})" for name, value in changed.items())
        return f"{task.name} is not scored as by {self.origin}, since you set {', '.join(texts)}: {in_use}"

    def has_other_examples(self, task: str, ids: Iterable[str]) -> bool:
        known = (self.examples or {}).get(task)
        return known is not None and known != hash_json(list(ids))


def scoring_settings(protocol: Protocol) -> dict[str, Any]:
    return {name: getattr(protocol, name) for name in SCORING}


def read_scored_as(model: str, folder: Path) -> ScoredAs | None:
    """What a model says of its scoring: a toy model, or one that was merged; None for any other.

    model: as the user names it. folder: where its checkpoint is. Raises `InputError` for a mark that another version
    wrote, or somebody else.
    """
    if model in TOY_MODELS:
        toy = SweepConfig.from_names({"preset": DEFAULT_PRESET})
        return ScoredAs(f"the preset {DEFAULT_PRESET}", scoring_settings(toy.protocol), str(toy.data_dir))
    path = folder / MERGED_FILE
    return _checked(path) if path.is_file() else None


def _checked(path: Path) -> ScoredAs | None:
    """Read the mark of a merged model; None where it does not say how the model was scored."""
    try:
        known = read_json(path)
        if known.get("scored_as") is None:
            return None
        found = ScoredAs(**known["scored_as"])
        if found.settings.keys() != set(SCORING):
            raise ValueError(f"its settings are {', '.join(sorted(found.settings))}")
        Protocol(**found.settings)
        return replace(found, tasks=tuple(found.tasks), data_dir=str(found.data_dir))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} must say how its model was scored as this version does: {error}. Merge the run again, or remove "
            "the file, and give the settings."
        ) from error
