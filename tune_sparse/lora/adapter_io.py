"""Adapters on disk: PEFT's format, with a marker where stock PEFT would compute another function."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.errors import InputError, unknown_name
from tune_sparse.files import read_json, write_json
from tune_sparse.lora.also_io import read_also_into
from tune_sparse.lora.layer import ADAPTER, apply_update_masks, inject, sparse_lora_layers
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.models.float_bits import row_chunks
from tune_sparse.modes import ADAPTER_MODES, MODES, Mode
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.masks import Masks, mask_sha256

MARKER = "tune_sparse.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Marker:
    """The record of an adapter beside PEFT's files: the mode that trained it and the mask it belongs to."""

    mode: str
    mask_sha256: str
    kept_zeros: dict[str, list[int]] = field(default_factory=dict)
    """Positions of weights that the mask keeps though they are exactly 0, by matrix: the rest of M is W != 0."""
    trained_compact: bool = False
    """It was trained on the smaller model without masked heads and channels."""

    @property
    def facts(self) -> Mode:
        """The facts of its mode."""
        return MODES[self.mode]


def save_adapter(adapted: PeftModel, folder: Path, mode: str, masks: Masks, trained_compact: bool = False) -> None:
    """Write the adapter in PEFT's format, and its marker.

    Stock PEFT would load the adapter of a masked update silently as plain LoRA, which computes another function.
    """
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(adapted).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    adapted.peft_config[ADAPTER].save_pretrained(str(folder))
    weights = {name: layer.base_layer.weight for name, layer in sparse_lora_layers(adapted)}
    kept_zeros = {name: _kept_zeros(weight, masks[name]) for name, weight in weights.items()}
    found = {name: positions for name, positions in kept_zeros.items() if positions}
    write_json(folder / MARKER, vars(Marker(mode, mask_sha256(masks), found, trained_compact)))


def _kept_zeros(weight: Tensor, mask: Tensor) -> list[int]:
    if not any(bool(((weight[rows] == 0) & mask[rows]).any()) for rows in row_chunks(weight)):
        return []
    return (mask & (weight == 0)).flatten().nonzero().flatten().tolist()


def read_marker(folder: Path) -> Marker | None:
    """The marker of an adapter; None for one that is not of this project. Raises `InputError` for a broken one."""
    path = folder / MARKER
    if not path.exists():
        return None
    try:
        marker = Marker(**read_json(path))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} must say mode and mask of its adapter: {error}. Copy the adapter again.") from error
    if marker.mode not in ADAPTER_MODES:
        raise unknown_name(f"mode of the adapter in {folder}", marker.mode, ADAPTER_MODES)
    return marker


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter of `folder` on `model`, in place: masked if it was trained masked, plain if it was trained so.
    What was trained beside it is written into the model.

    `model` must be what the adapter was trained on: pruned, if it belongs to a mask. Raises `InputError` for a model
    with other zeros, layers or sizes, and for an adapter that is not plain LoRA, or cut short.
    """
    marker, config = read_marker(folder), _read_config(folder)
    masks = model_masks(model, marker) if marker else None
    _check_targets(model, config)
    read_also_into(model, folder)
    adapted = inject(model, config)
    apply_update_masks(adapted, masks if marker and marker.facts.masks_update else None)
    set_peft_model_state_dict(adapted, _read_weights(folder, get_peft_model_state_dict(adapted)))
    adapted.requires_grad_(False)
    return adapted.eval()


def merge_adapter_into(model: PreTrainedModel, folder: Path, last_mask: Masks | None) -> None:
    """Merge the adapter of `folder`, and mask once more: a masked update has nothing there to lose."""
    adapted = load_adapter(model, folder)
    for name, layer in sparse_lora_layers(adapted):
        merged, kept = layer.merged_weight(), last_mask.get(name) if last_mask else None
        layer.base_layer.weight.data.copy_(merged if kept is None else merged.mul_(kept))
    adapted.unload()


def load_last_mask(model: PreTrainedModel, folder: Path) -> Masks | None:
    """The mask that an adapter's mode applies when it is deployed on a pruned model; None for a dense or foreign."""
    marker = read_marker(folder)
    return model_masks(model, marker) if marker is not None and marker.facts.is_pruned else None


def model_masks(model: PreTrainedModel, marker: Marker) -> BitMasks:
    """The keep-masks that a pruned model shows, which must be those of the marker."""
    weights = prunable_weights(model)
    for name in marker.kept_zeros.keys() - weights.keys():
        raise unknown_name("matrix of the adapter's mask", name, weights)
    masks = BitMasks.pack((name, _kept(weight, marker.kept_zeros.get(name, []))) for name, weight in weights.items())
    if marker.facts.is_pruned and masks.sha256 != marker.mask_sha256:
        raise InputError(
            f"an adapter trained {marker.mode} belongs to the mask {marker.mask_sha256[:12]}, got a model whose zeros "
            f"are {masks.sha256[:12]}. Give the model pruned as in its training; `tune-sparse merge --run` does."
        )
    return masks


def _kept(weight: Tensor, kept_zeros: list[int]) -> Tensor:
    """Its keep-mask, of which the positions of kept zeros count over the flat matrix."""
    mask = weight != 0
    mask.view(-1)[kept_zeros] = True
    return mask


def _read_config(folder: Path) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(f"{folder} must hold an adapter in PEFT's format: {error}. Fix the path.") from error
    extras = {name: getattr(config, name, None) for name in ("use_dora", "modules_to_save", "layers_to_transform")}
    extras |= {"bias": None if getattr(config, "bias", "none") == "none" else config.bias}
    found = [f"{name}={value}" for name, value in extras.items() if value]
    if not isinstance(config, LoraConfig) or found:
        kind = f"{config.peft_type} {' '.join(found)}".replace("PeftType.", "")
        raise InputError(f"an adapter must be plain LoRA, got {kind} in {folder}. Merge it with PEFT.")
    config.base_model_name_or_path = None  # a path of another time; what counts is whether it fits
    return config


def _check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """PEFT itself is content when one of several names is found."""
    if isinstance(config.target_modules, str):  # a regular expression, or "all-linear"
        return
    names = {name for name, _ in model.named_modules() if name}
    ends = {name.rsplit(".", 1)[-1] for name in names}
    for target in config.target_modules or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise unknown_name("target module of the adapter", target, ends)


def _read_weights(folder: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors, each one there and of the shape of `wanted`."""
    path = folder / WEIGHTS
    try:
        found: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} must be a whole safetensors file: {error}. Copy the adapter again.") from error
    for name in wanted.keys() ^ found.keys():
        where = "the model has no such layer" if name in found else f"{path} lacks it"
        raise InputError(f"an adapter must fit its model, {name}: {where}. Give the model that it was trained on.")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise InputError(
                f"an adapter must fit its model, {name} is {tuple(tensor.shape)} in {path}, the model wants "
                f"{tuple(wanted[name].shape)}. Give the model that it was trained on."
            )
    return found
