"""Settings as flags, `--set NAME=VALUE` and YAML: names, help and defaults are those of the fields of a dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from tune_sparse.config.options import converted
from tune_sparse.errors import InputError


def add_settings(
    command: argparse.ArgumentParser, owner: type, names: Collection[str], shows_default: bool = False
) -> None:
    """Add a flag for each of the named fields of a dataclass."""
    for f in fields(owner):
        if f.name in names:
            many: dict[str, Any] = {"nargs": "+"} if "tuple" in str(f.type) else {}
            flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
            shown = f"{help} (default {_shown(f)})" if shows_default else help
            command.add_argument(flag, metavar=f.name.rstrip("s").upper(), help=shown, **many)


def _shown(f: Field[Any]) -> str:
    return " ".join(f.default) if isinstance(f.default, tuple) else str(f.default)


def given_flags(chosen: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """Those of the named flags that were given; the others keep the defaults of what they are settings of."""
    return {name: value for name in names if (value := getattr(chosen, name)) is not None}


def given_settings(chosen: argparse.Namespace, owner: type, names: Collection[str]) -> dict[str, Any]:
    """Return what `given_flags` does, each value as the type of its field."""
    declared = {f.name: f for f in fields(owner)}
    return {name: converted(owner, declared[name], value) for name, value in given_flags(chosen, names).items()}


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """The names and values of `--set NAME=VALUE ...`; later ones win."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set takes NAME=VALUE, got {text!r}. Write --set steps=20, say.")
        settings[name] = value
    return settings


def read_yaml(flag: str, path: Path) -> Any:
    """The content of the YAML file that a flag names."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{flag} must be a readable YAML file: {error}. Fix it.") from error
