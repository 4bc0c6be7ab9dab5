"""The flags of every command that takes a sweep, one for each setting: flags, YAML and Python have the same names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from search_spaces.matrix import PRESETS
from tune_sparse.cli.settings import add_set, add_settings, given_flags, parse_settings, read_yaml
from tune_sparse.config import Cerebras, SweepConfig
from tune_sparse.errors import InputError, unknown_name

DEFAULT_PRESET = "toy"
SWEEP = tuple(f.name for f in fields(SweepConfig) if f.name not in ("protocol", "cerebras"))
"""The fields of `SweepConfig` that hold no settings of their own."""
CEREBRAS = tuple(f.name for f in fields(Cerebras))


SETTINGS_GROUP = "data and settings"


def add_sweep_options(
    command: argparse.ArgumentParser, groups: Mapping[str, Sequence[str]], sets: bool = True
) -> dict[str, Any]:
    """Add the preset, the YAML file and the named settings of a sweep; returns the group of each heading.

    sets: `--set` is an option too, in the group of the data.
    """
    add_preset(command)
    made = {heading: command.add_argument_group(heading) for heading in groups}
    for heading, names in groups.items():
        owner = Cerebras if set(names) <= set(CEREBRAS) else SweepConfig
        add_settings(made[heading], owner, names)
    group = made.get(SETTINGS_GROUP, command)
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file with settings of a sweep as `name: value`: its options, with _ for -, and what its --set "
        "takes. The file changes the preset, and options change both (default: none)",
    )
    if sets:
        add_set(group, "settings of training and scoring, listed below")
    return made


def add_preset(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "preset",
        nargs="?",
        default=DEFAULT_PRESET,
        metavar="PRESET",
        help="named settings to begin with, listed below; they take the place of the defaults that this help shows, "
        f"and options take theirs (default: {DEFAULT_PRESET})",
    )


def sweep_config(chosen: argparse.Namespace) -> SweepConfig:
    """The preset, then the YAML file, then the flags, then --set: later ones win."""
    if chosen.preset not in PRESETS:
        raise unknown_name("preset", chosen.preset, PRESETS)
    names = dict(PRESETS[chosen.preset]) | _yaml(chosen.config) | given_flags(chosen, (*SWEEP, *CEREBRAS))
    return SweepConfig.from_names(names | parse_settings(getattr(chosen, "set", ())))


def _yaml(path: Path | None) -> dict[str, Any]:
    content = {} if path is None else read_yaml("--config", path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must map names to values, got {content!r}. Write `steps: 20`, say.")
    return content
