"""LoRA on pruned weights: the effective weight, the layer that trains it, and the exact merge.

W: (O, I) frozen and already pruned, A: (R, I), B: (O, R), M: (O, I) keep-mask, s = alpha / R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.masks import Masks
from tune_sparse.models import PRUNED
from tune_sparse.paths import write_json
from tune_sparse.scores import uniform

MARKER = "tune_sparse.json"
"""Beside an adapter: the mode that trained it, and the checksum of its mask."""
ADAPTER = "default"
"""PEFT's name for the only adapter."""


def effective_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """W + s(BA), or W + s(BA)⊙M with a mask, in the dtype of W.

    Training, merging and scoring all use this function, so that they agree to the last bit.
    """
    return (weight + lora_update(A, B, scaling, mask)).to(weight.dtype)


def lora_update(A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """s(BA), or s(BA)⊙M with a mask, in the dtype of the adapter: (O, I)."""
    update = scaling * (B @ A)
    return update if mask is None else update * mask


class SparseLora(PeftLinear):
    """y = (W + s(BA)⊙M) x + b, M absent where the mode does not mask the update.

    Dropout p > 0 acts on the adapter's input, as in PEFT: y = Wx + b + (s(BA)⊙M) dropout(x).
    """

    keep_mask: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s."""
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]

    def merged_weight(self) -> Tensor:
        """The weight that this layer computes with: (O, I)."""
        return effective_weight(self.base_layer.weight, *self.factors(), self.keep_mask)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dropout = self.lora_dropout[ADAPTER]
        if not self.training or isinstance(dropout, nn.Identity):
            return F.linear(x, self.merged_weight(), self.base_layer.bias)
        return self.base_layer(x) + F.linear(dropout(x), self.get_delta_weight(ADAPTER).to(x.dtype))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What PEFT's own merge would add: masked too, where the mode masks the update."""
        return lora_update(*self.factors(), self.keep_mask)


def adapt_model(model: PreTrainedModel, protocol: Protocol, update_masks: Masks | None, seed: int) -> PeftModel:
    """Put adapters into the prunable layers of `model`, in place; `update_masks` confines their update.

    B starts at zero and A uniform in ±1/sqrt(I) (Hu et al. 2021, arXiv:2106.09685, and PEFT), from `seed` and the
    layer's name alone. PEFT's own initialisation depends on the layers that came before.
    """
    config = LoraConfig(
        r=protocol.lora_rank,
        lora_alpha=protocol.lora_alpha,
        lora_dropout=protocol.lora_dropout,
        target_modules=list(PRUNED),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: SparseLora})
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    for name, layer in sparse_lora_layers(adapted):
        A, B, _ = layer.factors()
        A.data.copy_((2 * uniform(A.shape, f"{seed}/adapter/{name}") - 1) / math.sqrt(A.shape[1]))
        B.data.zero_()
        if update_masks is not None:
            layer.keep_mask = update_masks[name]
    return adapted


def load_adapter(model: PreTrainedModel, folder: Path, update_masks: Masks | None) -> PeftModel:
    """Put a saved adapter of ours into `model`, in place; `update_masks` confines its update, as in training."""
    config = LoraConfig.from_pretrained(str(folder))
    config._register_custom_module({nn.Linear: SparseLora})
    adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    for name, layer in sparse_lora_layers(adapted):
        if update_masks is not None:
            layer.keep_mask = update_masks[name]
    return adapted


def sparse_lora_layers(adapted: PeftModel) -> Iterator[tuple[str, SparseLora]]:
    """(name of the weight in the checkpoint, layer) of every adapted layer."""
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, SparseLora):
            yield f"{name}.weight", module


def merged_weights(adapted: PeftModel) -> dict[str, Tensor]:
    """What each adapted layer computes with: (O, I) by checkpoint name."""
    return {name: layer.merged_weight().detach() for name, layer in sparse_lora_layers(adapted)}


def updates(adapted: PeftModel) -> dict[str, Tensor]:
    """s(BA), masked where the layer masks it, in the adapters' fp32."""
    return {name: layer.get_delta_weight(ADAPTER).detach() for name, layer in sparse_lora_layers(adapted)}


def lost_fraction(wanted: dict[str, Tensor], obtained: dict[str, Tensor]) -> float:
    """|wanted - obtained|² / |wanted|² over all matrices: the share of an update that did not arrive."""
    lost = sum(float((wanted[name] - obtained[name]).double().square().sum()) for name in wanted)
    total = sum(float(update.double().square().sum()) for update in wanted.values())
    return lost / total if total else 0.0


def save_adapter(adapted: PeftModel, folder: Path, mode: str, mask_sha256: str) -> None:
    """Write the adapter in PEFT's format.

    Stock PEFT would load the adapter of a masked update silently as plain LoRA, which computes another function:
    `tune_sparse.json` says which mode and mask it belongs to.
    """
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(adapted).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapted.peft_config[ADAPTER].save_pretrained(str(folder))
    write_json(folder / MARKER, {"mode": mode, "mask_sha256": mask_sha256})
