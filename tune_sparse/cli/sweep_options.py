"""The flags of every command that takes a sweep, one for each setting: flags, YAML and Python have the same names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tune_sparse.cli.settings import add_set, add_settings, given_flags, parse_settings, read_yaml
from tune_sparse.config import BudgetOptions, Cerebras, EarlyStopping, SweepConfig
from tune_sparse.config.options import describe_option
from tune_sparse.errors import InputError

SWEEP = tuple(
    f.name
    for f in fields(SweepConfig)
    if f.name not in ("protocol", "budgets", "cerebras", "schedule_settings", "early_stopping", "axes")
)
"""The fields of `SweepConfig` that hold no settings of their own."""
BUDGETS = tuple(f.name for f in fields(BudgetOptions))
CEREBRAS = tuple(f.name for f in fields(Cerebras))
EARLY_STOPPING = tuple(f.name for f in fields(EarlyStopping))
OWNERS = ((SweepConfig, SWEEP), (BudgetOptions, BUDGETS), (Cerebras, CEREBRAS), (EarlyStopping, EARLY_STOPPING))

SETTINGS_GROUP = "data and settings"
CONFIG_HELP = (
    "YAML file with settings of a sweep as `name: value`: its options, with _ for -, and what its --set takes, all "
    "listed by `tune-sparse sweep --help`. The file changes the preset, and options change both (default: none)"
)


def add_sweep_options(
    command: argparse.ArgumentParser,
    groups: Mapping[str, Sequence[str]],
    set_help: str = "",
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Add the preset, the YAML file and the named settings of a sweep; returns the group of each heading.

    set_help: what `--set`, in the group of the data, changes; without it there is no such option. texts: {name of a
    setting: its help}, where a command has another one than the field.
    """
    add_preset(command)
    made = {heading: command.add_argument_group(heading) for heading in groups}
    for heading, names in groups.items():
        for owner, own in OWNERS:
            add_settings(made[heading], owner, [name for name in names if name in own], texts)
    group = made.get(SETTINGS_GROUP, command)
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=(texts or {}).get("config") or CONFIG_HELP,
    )
    if set_help:
        add_set(group, set_help)
    return made


def add_preset(command: argparse.ArgumentParser) -> None:
    field = SweepConfig.__dataclass_fields__["preset"]
    command.add_argument("preset", nargs="?", metavar=field.metadata["metavar"], help=describe_option(field))


def add_axes(group: Any) -> None:
    group.add_argument(
        "--axis",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="settings of training, calibration, recovery or schedules (those of --set) with several values: every "
        "cell that reads them is trained with each, or with each combination of several axes. Two settings that go "
        "together are NAME:NAME=VALUE:VALUE,VALUE:VALUE. Of each cell the values with the lowest loss on the selection "
        "examples are chosen, over all seeds, and reports compare these (default: every setting has one value)",
    )


def sweep_config(chosen: argparse.Namespace) -> SweepConfig:
    """The preset, then the YAML file, then the flags, then --set and --axis: later ones win."""
    names = _yaml(chosen.config) | given_flags(chosen, (*SWEEP, *BUDGETS, *CEREBRAS, *EARLY_STOPPING))
    axes = parse_settings(getattr(chosen, "axis", ()), "--axis", "learning_rate=1e-4,3e-4")
    names |= {"axes": axes} if axes else {}
    return SweepConfig.from_names(names | parse_settings(getattr(chosen, "set", ())))


def _yaml(path: Path | None) -> dict[str, Any]:
    content = {} if path is None else read_yaml("--config", path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must map names to values, got {content!r}. Write `steps: 20`, say.")
    return content
