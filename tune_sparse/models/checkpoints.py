"""Checkpoints in Hugging Face format: found, checked, identified, loaded; and their prunable matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.files import cache_dir, read_json, write_json
from tune_sparse.models.architectures import TRAINED, architecture_named, matrix_named, read_weights, unfused
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.from_scratch import (
    FROM_SCRATCH,
    draw_from_scratch,
    from_scratch_folder,
    is_from_scratch,
    source_folder,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tune_sparse.models.safetensors_io import TensorFiles

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SIDE_FILES = (*TOKENIZERS, *TOKENIZER_SETTINGS, "vocab.json", "merges.txt", "generation_config.json")
"""Files that a copy of a checkpoint takes along."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was checked: right class, all weights present and finite, a tokenizer that fits."""

    name: str
    path: Path
    fingerprint: str
    """SHA-256 of config, weights and tokenizer: part of a run's identity."""
    dims: ModelDims


def short_name(reference: str) -> str:
    """The last part of a path or hub id, without its revision: what names a model in tables."""
    if (source := source_folder(reference)) is not None:
        return f"{short_name(str(source))}-random"
    folder = Path(reference).expanduser()
    return folder.resolve().name if folder.is_dir() else reference.split("@", 1)[0].rsplit("/", 1)[-1]


def find_folder(reference: str) -> Path:
    """The folder of a model that was trained or drawn here, a path, a `.mdl` of Cerebras, or a hub id that was fetched.

    Raises `InputError` where `prepare_models` has something to do first.
    """
    from tune_sparse.models.toy_models import TOY_MODELS, toy_model_folder

    if reference in TOY_MODELS:
        folder = toy_model_folder(reference)
        if not folder.is_dir():
            raise NotReadyError(
                f"a toy model must be trained before it is used, {reference!r} is not. "
                f"Run `tune-sparse prepare --models {reference}`."
            )
        return folder
    if is_from_scratch(reference):
        folder = from_scratch_folder(reference)
        if not folder.is_dir():
            raise NotReadyError(
                f"random weights must be drawn before they are used, those of {reference!r} are not. "
                f"Run `tune-sparse prepare --models {reference}`."
            )
        return folder
    if Path(reference).expanduser().is_dir():
        return Path(reference).expanduser()
    if _is_mdl(reference):
        from tune_sparse.models.mdl import mdl_folder

        return mdl_folder(Path(reference).expanduser())
    return _hub_folder(reference, local_files_only=True)


def prepare_models(references: Sequence[str], report: Callable[[str], None]) -> dict[str, Path]:
    """Train the toy models, draw random weights and fetch the hub ids among `references`; returns the folder of each.

    Afterwards `find_folder` needs no network.
    """
    from tune_sparse.models.toy_models import TOY_MODELS, train_toy_models

    toy = [reference for reference in references if reference in TOY_MODELS]
    folders = dict(zip(toy, train_toy_models(toy, report), strict=True))
    for reference in references:
        if is_from_scratch(reference):
            folders[reference] = draw_from_scratch(reference, report)
        elif reference not in toy:
            is_folder = Path(reference).expanduser().is_dir() or _is_mdl(reference)
            folders[reference] = find_folder(reference) if is_folder else _hub_folder(reference, local_files_only=False)
    return folders


def _is_mdl(reference: str) -> bool:
    return reference.endswith(".mdl") and Path(reference).expanduser().is_file()


def _hub_folder(reference: str, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hub_id, _, revision = reference.partition("@")
    _check_hub_id(hub_id)
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision or None,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors", "tokenizer*"],
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise NotReadyError(
            f"the weights of a model must be on this machine before a sweep, {reference!r} is not "
            f"({type(error).__name__}). Run `tune-sparse prepare --models {reference}` where there is a network, "
            "or give a folder."
        ) from error
    return Path(folder)


def _check_hub_id(hub_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from tune_sparse.models.toy_models import TOY_MODELS

    try:
        validate_repo_id(hub_id)
        is_valid = "/" in hub_id
    except HFValidationError:
        is_valid = False
    if not is_valid:
        known = (*TOY_MODELS, *FROM_SCRATCH)
        close = get_close_matches(hub_id, known, n=1)
        raise InputError(
            f"a model is {', '.join(known)}, a folder, or a hub id such as org/name@revision, "
            f"got {hub_id!r}, which is none of them. "
            + (f"Did you mean {close[0]!r}?" if close else "Fix the name or the path.")
        )


def check_checkpoint(reference: str) -> Checkpoint:
    """Find a model and check its config and every weight, reading each tensor once.

    The result is remembered by the files' sizes and times. Raises `InputError` for a missing config, weights or
    tokenizer, an unsupported class, or a weight that is not finite (which tensor).
    """
    from tune_sparse.models.safetensors_io import weight_files

    folder = find_folder(reference)
    _check_config(folder)
    weights = weight_files(folder)
    files = [folder / "config.json", *weights, *_tokenizer_files(folder)]
    memory = cache_dir() / "fingerprints" / (hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16] + ".json")
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    known = read_json(memory) if memory.exists() else {}
    if known.get("stamp") != stamp:
        _check_weights(folder, weights)
        _check_tokenizer(folder)
        known = {"stamp": stamp, "fingerprint": fingerprint_of_files(files)}
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, known)
    from transformers import AutoConfig

    dims = ModelDims.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return Checkpoint(short_name(reference), folder, known["fingerprint"], dims)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`. Raises `InputError` unless it is there and maps names to values."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"a model folder needs config.json, {folder} has none. Give a Hugging Face checkpoint.")
    try:
        config: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise InputError(f"{path} must be JSON: {error}. Fix or fetch it again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must map names to values, got {type(config).__name__}. Fetch it again.")
    return config


def _check_config(folder: Path) -> None:
    path, config = folder / "config.json", read_config(folder)
    found = config.get("architectures") or ["no class at all"]
    if found[0] not in TRAINED:
        raise InputError(f"the class of a model must be {' or '.join(TRAINED)}, {path} says {found[0]}.")
    architecture = architecture_named(found[0])
    kind = architecture.model_type
    if config.get("model_type") != kind:  # transformers would look for code that the folder brings
        raise InputError(f"the model_type of a {found[0]} must be {kind!r}, {path} says {config.get('model_type')!r}.")
    for name in architecture.sizes:
        if not isinstance(config.get(name), int):
            raise InputError(f"{path} must have the sizes of its model, {name!r} is missing. Add it.")


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in TOKENIZERS + TOKENIZER_SETTINGS if (folder / name).is_file()]
    if not any(path.name in TOKENIZERS for path in found):
        raise InputError(f"a model folder needs {' or '.join(TOKENIZERS)}, {folder} has neither. Add it.")
    return found


def _check_tokenizer(folder: Path) -> None:
    from transformers import AutoConfig

    tokenizer, vocabulary = load_tokenizer(folder), AutoConfig.from_pretrained(folder).vocab_size
    if tokenizer.eos_token_id is None:
        raise InputError(f"a tokenizer needs an end-of-text token, {folder} has none. Set eos_token.")
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"a tokenizer must fit its model, {folder} has {len(tokenizer)} tokens and embeddings for {vocabulary}. "
            "Give the tokenizer that the model was trained with."
        )


def _check_weights(folder: Path, files: Sequence[Path]) -> None:
    """Every tensor of the model's class is there, once, in its shape, and finite: nothing is filled in at random."""
    from safetensors import SafetensorError, safe_open

    missing, prefix = _wanted_shapes(folder)
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (a safe_open is not a mapping)
                    tensor = tensors.get_tensor(name)
                    wanted = missing.pop(name if name in missing else f"{prefix}.{name}", None)
                    if wanted is not None and tuple(tensor.shape) != wanted:
                        raise InputError(
                            f"{name} in {path} must be {wanted}, got {tuple(tensor.shape)}. Fetch it again."
                        )
                    if not tensor.isfinite().all():
                        raise InputError(f"weights must be finite, {name} in {path} has NaN or inf. Fetch it again.")
        except SafetensorError as error:
            raise InputError(f"{path} must be a safetensors file: {error}. Fetch it again.") from error
    _check_not_shared(missing, files)
    if missing:
        raise InputError(f"a checkpoint needs all its weights, {folder} lacks {', '.join(missing)}. Fetch it again.")


def _check_not_shared(missing: Iterable[str], files: Sequence[Path]) -> None:
    """Raise `InputError` for a prunable matrix that is one tensor with another, which `safetensors.torch.save_model`
    leaves out and notes in the metadata: masks, and updates, of the two would be of one weight."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as tensors:
            shared_with = tensors.metadata() or {}
        for name in missing:
            if name in shared_with and matrix_named(name):
                raise InputError(
                    f"a matrix that is pruned must be a tensor of its own, {name} is one with {shared_with[name]} in "
                    f"{path}. Untie them: save each with its own copy."
                )


def _wanted_shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], str]:
    """{tensor name: shape} of the model's class, of which tied heads are not stored; and the first part of the names,
    which a checkpoint of the bare decoder lacks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes, model.base_model_prefix


def fingerprint_of_files(files: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, tensors: TensorFiles | None = None
) -> PreTrainedModel:
    """The model in evaluation mode, its weights frozen, with no settings of its own for generating text.

    Each weight goes from the mapped file onto the device, in its dtype: nothing of the model is in memory twice.
    tensors: where they are read, by default the folder's own files.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from tune_sparse.models.safetensors_io import TensorFiles, weight_files

    config = without_dropout(AutoConfig.from_pretrained(folder, local_files_only=True))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    _read_weights_into(model, tensors or TensorFiles(weight_files(folder)), device)
    model.tie_weights()
    model.generation_config = GenerationConfig()
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None  # GPT-2's waits for the device to look
    loaded: PreTrainedModel = model.to(device).requires_grad_(False).eval()
    return loaded


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The config with every dropout set to 0, in place: a protocol has none but that of its adapters' inputs."""
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop", "layerdrop")) and value:
            setattr(config, name, 0.0)
    return config


def _read_weights_into(model: PreTrainedModel, tensors: TensorFiles, device: torch.device) -> None:
    """Give a model without data its weights, one at a time. Raises `InputError` for a tensor that is missing."""
    import torch

    for name, empty in list(model.named_parameters()):
        filled = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        for part, own in unfused(name, filled).items():
            if tensors.stored_name(part) not in tensors:
                raise InputError(f"a checkpoint needs all its weights, {part} is missing. Fetch it again.")
            tensors.read_into(own, part)
        layer, _, leaf = name.rpartition(".")
        model.get_submodule(layer).register_parameter(leaf, torch.nn.Parameter(filled, requires_grad=False))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prunable_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """{checkpoint tensor name: weight in its layout} of every prunable matrix; the tensors are the model's own."""
    return read_weights(model)


def write_weights_into(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy `weights` into the prunable matrices of a model."""
    matrices = read_weights(model)
    assert matrices.keys() == weights.keys(), "a model with adapters has its matrices under other names"
    for name, own in matrices.items():
        own.copy_(weights[name])
