"""The flags of every command that takes a sweep, one for each setting: flags, YAML and Python have the same names."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from search_spaces.matrix import PRESETS
from tune_sparse.cli.settings import add_settings, given_flags, parse_settings, read_yaml
from tune_sparse.config import Cerebras, SweepConfig
from tune_sparse.errors import InputError, unknown_name

DEFAULT_PRESET = "toy"
SWEEP = tuple(f.name for f in fields(SweepConfig) if f.name not in ("protocol", "cerebras"))
"""The fields of `SweepConfig` that hold no settings of their own."""
CEREBRAS = tuple(f.name for f in fields(Cerebras))


def add_sweep_options(command: argparse.ArgumentParser) -> None:
    preset = f"default: {DEFAULT_PRESET}"
    command.add_argument("preset", nargs="?", default=DEFAULT_PRESET, metavar="PRESET", help=preset)
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the names below; flags win")
    add_settings(command, SweepConfig, SWEEP)
    add_settings(command, Cerebras, CEREBRAS)
    add_protocol_option(command)


def add_protocol_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="of the protocol")


def sweep_config(chosen: argparse.Namespace) -> SweepConfig:
    """The preset, then the YAML file, then the flags, then --set: later ones win."""
    if chosen.preset not in PRESETS:
        raise unknown_name("preset", chosen.preset, PRESETS)
    names = dict(PRESETS[chosen.preset]) | _yaml(chosen.config) | given_flags(chosen, (*SWEEP, *CEREBRAS))
    return SweepConfig.from_names(names | parse_settings(chosen.set))


def _yaml(path: Path | None) -> dict[str, Any]:
    content = {} if path is None else read_yaml("--config", path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must map names to values, got {content!r}. Write `steps: 20`, say.")
    return content
