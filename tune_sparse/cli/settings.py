"""Settings as flags, `--set NAME=VALUE` and YAML: names, help and defaults are those of the fields of a dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tune_sparse.config import SweepConfig
from tune_sparse.config.options import converted, describe_option
from tune_sparse.errors import InputError

DATA_DIR = SweepConfig.__dataclass_fields__["data_dir"].metadata["help"]


def add_set(command: Any, what: str) -> None:
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help=f"change {what} (default: change none)",
    )


def add_settings(command: Any, owner: type, names: Collection[str], texts: Mapping[str, str] | None = None) -> None:
    """Add a flag for each of the named fields of a dataclass, in the order of the names.

    texts: {name: its help}, where a command has another one than the field.
    """
    declared = {f.name: f for f in fields(owner)}
    for f in (declared[name] for name in names):
        flag, text = "--" + f.name.replace("_", "-"), (texts or {}).get(f.name) or describe_option(f)
        if not f.metadata["metavar"]:  # it takes no value: giving it says yes
            command.add_argument(flag, action="store_const", const=True, help=text)
            continue
        many: dict[str, Any] = {"nargs": "+"} if "tuple" in str(f.type) else {}
        command.add_argument(flag, metavar=f.metadata["metavar"], help=text, **many)


def given_flags(chosen: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """Those of the named flags that were given; the others, and flags that the command has not, keep their defaults."""
    return {name: value for name in names if (value := getattr(chosen, name, None)) is not None}


def given_settings(chosen: argparse.Namespace, owner: type, names: Collection[str]) -> dict[str, Any]:
    """Return what `given_flags` does, each value as the type of its field."""
    declared = {f.name: f for f in fields(owner)}
    return {name: converted(owner, declared[name], value) for name, value in given_flags(chosen, names).items()}


def parse_settings(texts: Sequence[str], flag: str = "--set", example: str = "steps=20") -> dict[str, str]:
    """The names and values of `--set NAME=VALUE ...`, or of another flag; later ones win."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{flag} takes NAME=VALUE, got {text!r}. Write {flag} {example}, say.")
        settings[name] = value
    return settings


def read_yaml(flag: str, path: Path) -> Any:
    """The content of the YAML file that a flag names."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{flag} must be a readable YAML file: {error}. Fix it.") from error
