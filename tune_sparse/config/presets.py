"""The preset that a sweep begins with: the named one, or that of the toy models where nothing else is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search_spaces.matrix import PRESETS, TOY_MODELS
from tune_sparse.config.options import listed
from tune_sparse.errors import unknown_name

DEFAULT_PRESET = "toy"


def preset_settings(names: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the preset that `names` name, its name among them; or those of `toy`, where they name no preset
    and no model but toy ones; or else none.

    A model that is not a toy never takes generated examples from a preset. Raises `InputError` for an unknown preset.
    """
    models = listed(names["models"]) if "models" in names else TOY_MODELS
    are_toys = bool(models) and all(model in TOY_MODELS for model in models)
    preset = names.get("preset") or (DEFAULT_PRESET if are_toys else None)
    if preset is None:
        return {}
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    settings = PRESETS[preset] | {"preset": preset}
    if is_toy_preset(preset) and not are_toys:
        del settings["data_dir"]
    return settings


def is_toy_preset(name: str | None) -> bool:
    return name is not None and set(PRESETS[name]["models"]) <= set(TOY_MODELS)
