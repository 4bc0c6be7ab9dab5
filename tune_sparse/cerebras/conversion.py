"""Checkpoints between Hugging Face's format and Model Zoo's, through the converter of the site's release."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_sparse.cerebras.content_cache import cached
from tune_sparse.cerebras.environment import SiteEnvironment
from tune_sparse.cerebras.failures import classify_failure
from tune_sparse.errors import InputError, RunError
from tune_sparse.files import write_json
from tune_sparse.models.checkpoints import read_config
from tune_sparse.models.safetensors_io import INDEX, TensorFiles, weight_files

MODEL_TYPES = ("llama", "mistral")
MIXTRAL = (
    "Model Zoo converts a Mixtral, with moe_implementation: optimized, but its LoRA does not reach the experts, which "
    "hold nearly all of the weights: a training here would leave them out. "
)
CONVERSION_SECONDS = 7200
SCALED_ROPE = ("llama3",)
"""The kinds of rope scaling that were seen to compute the same there."""


@dataclass(frozen=True)
class Converted:
    """A checkpoint in Model Zoo's format."""

    config: Path
    checkpoint: Path


def check_convertible(folder: Path) -> None:
    """Raise `InputError` for a model that Model Zoo would compute differently, or not at all."""
    config = read_config(folder)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        known = MIXTRAL if kind == "mixtral" else ""
        raise InputError(
            f"the backend cerebras trains {' and '.join(MODEL_TYPES)} models, {folder} is {kind!r}. {known}"
            "Use --backend torch."
        )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rules = {
        f"head_dim = hidden_size / num_attention_heads = {hidden // heads}": (
            config.get("head_dim") in (None, hidden // heads),
            config.get("head_dim"),
        ),
        f"no rope scaling but {', '.join(SCALED_ROPE)}": (_scaling(config) in (None, *SCALED_ROPE), _scaling(config)),
        "no bias in attention and mlp": (not (config.get("attention_bias") or config.get("mlp_bias")), "one"),
    }
    for wanted, (holds, found) in rules.items():
        if not holds:
            raise InputError(f"the backend cerebras needs {wanted}, {folder} has {found}. Use --backend torch.")


def to_cerebras(folder: Path, fingerprint: str, environment: SiteEnvironment) -> Converted:
    """A Hugging Face checkpoint in Model Zoo's format, converted once for each content and format.

    Raises `RunError` if the converter fails: nothing else is ever trained in its place.
    """
    target = environment.checkpoint_format

    def convert(partial: Path) -> None:
        source = partial / "source"
        kind = _write_source(folder, source)
        _convert(environment, kind, ["hf", target], source / "config.json", source / INDEX, partial, [])
        shutil.rmtree(source)

    return _converted_in(cached(f"{fingerprint[:32]}-{target}", convert))


def to_hugging_face(converted: Converted, model_type: str, output: Path, environment: SiteEnvironment) -> None:
    """Write a checkpoint of Model Zoo's format as a Hugging Face one, into a folder that exists."""
    formats = [environment.checkpoint_format, "hf"]
    export = ["--export-safetensors"]
    _convert(environment, model_type, formats, converted.config, converted.checkpoint, output, export)


def _converted_in(folder: Path) -> Converted:
    configs, checkpoints = list(folder.glob("*.yaml")), list(folder.glob("*.mdl"))
    if len(configs) != 1 or len(checkpoints) != 1:
        raise RunError(f"a conversion must be one .yaml and one .mdl, {folder} has other files. Remove it.")
    return Converted(configs[0], checkpoints[0])


def _convert(
    environment: SiteEnvironment,
    model_type: str,
    formats: Sequence[str],
    config: Path,
    checkpoint: Path,
    output: Path,
    extra: Sequence[str],
) -> None:
    command = [environment.python, "-m", "cerebras.modelzoo.cli.main", "checkpoint", "convert", "--model", model_type]
    command += ["--src-fmt", formats[0], "--tgt-fmt", formats[1], "--config", config, "--output-dir", output]
    log = output.with_name(f"{output.name}.log")
    with log.open("w") as stream:
        done = subprocess.run(
            [*map(str, command), *extra, str(checkpoint)],
            env=environment.variables(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            timeout=CONVERSION_SECONDS,
        )
    if done.returncode:
        raise classify_failure(log, done.returncode)
    log.unlink()


def _write_source(folder: Path, source: Path) -> str:
    """Write an index, and a config with the names of transformers 4, for the converter. Returns the model type."""
    source.mkdir()
    config = read_config(folder)
    write_json(source / "config.json", {**config, **_rope(config)})
    weights = TensorFiles(weight_files(folder))
    for path in set(weights.paths.values()):
        (source / path.name).symlink_to(path.resolve())
    weight_map = {name: path.name for name, path in weights.paths.items()}
    write_json(source / INDEX, {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return str(config["model_type"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, which the converter would ignore without a word.

    It refuses a scaling with entries that it does not know, and `rope_theta` is one.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
    is_plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return {"rope_theta": theta, "rope_scaling": None if is_plain else rope}


def _scaling(config: dict[str, Any]) -> str | None:
    """Name the kind of rope scaling, None for none."""
    scaling = _rope(config)["rope_scaling"]
    return scaling and str(scaling.get("rope_type", scaling.get("type")))
