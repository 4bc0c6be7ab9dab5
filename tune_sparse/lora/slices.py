"""Slices of a super-adapter: active while it trains, deployed without loading anything, or written as an adapter.

W: (O, I) pruned, A: (R, I), B: (O, R), M: (O, I). The slice of rank r is B[:, :r] A[:r], its s stays alpha / R
(Shears, arXiv:2404.10934, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.files import write_json
from tune_sparse.lora.adapter_io import MARKER, WEIGHTS, Marker, load_adapter
from tune_sparse.lora.layer import sparse_lora_layers
from tune_sparse.lora.masked_linear import EffectiveWeight, Workspace
from tune_sparse.lora.rank_space import Ranks, Space
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.pruning.masks import Masks


def count_layers(model: PeftModel | PreTrainedModel) -> int:
    """Decoder blocks of a model."""
    return int(model.config.num_hidden_layers)


def set_ranks_into(adapted: PeftModel, space: Space, ranks: Ranks) -> None:
    """Activate the slice that `ranks` names, in place."""
    for name, layer in sparse_lora_layers(adapted):
        layer.active_rank = space.active_rank(name, ranks)


@dataclass(frozen=True)
class Layer:
    """One layer of a super-adapter, without its weight."""

    A: Tensor
    B: Tensor
    scaling: float
    impl: EffectiveWeight
    """It masks the update where the mode does."""
    transposed: bool
    """Its weight is stored as (I, O)."""

    @property
    def size(self) -> tuple[int, int]:
        """(O, I)"""
        return len(self.B), self.A.shape[1]

    def oriented(self, stored: Tensor) -> Tensor:
        """(O, I) from the layout of the checkpoint, or back: a view."""
        return stored.T if self.transposed else stored


@dataclass
class Slices:
    """A trained super-adapter, taken apart, and a plain model that computes one of its slices at a time."""

    model: PreTrainedModel
    space: Space
    marker: Marker
    pruned: Mapping[str, Tensor]
    """W⊙M of every matrix, read when its slice changes: the model has the only copy that stays."""
    last_masks: Masks | None
    """What the mode masks once more when it deploys."""
    layers: dict[str, Layer]
    active: dict[str, int] = field(default_factory=dict)
    """{matrix: the rank that the model's weight has now}"""

    @classmethod
    def from_folder(
        cls,
        model: PreTrainedModel,
        folder: Path,
        space: Space,
        marker: Marker,
        masks: Masks,
        pruned: Mapping[str, Tensor],
    ) -> Slices:
        """From the adapter in `folder` and the pruned model that it was trained on.

        Raises `InputError` for an adapter that does not fit the model.
        """
        adapted, workspace = load_adapter(model, folder), Workspace()
        layers = {}
        for name, layer in sparse_lora_layers(adapted):
            A, B, scaling = layer.factors()
            impl = EffectiveWeight(layer.frozen, layer.keep_mask, workspace)
            layers[name] = Layer(A.detach(), B.detach(), scaling, impl, layer.frozen is not layer.base_layer.weight)
        last_masks = masks if marker.facts.masks_at_merge else None
        return cls(adapted.unload(), space, marker, pruned, last_masks, layers, dict.fromkeys(layers, 0))

    @torch.no_grad()
    def activate(self, ranks: Ranks) -> None:
        """Let the model compute the slice that `ranks` names: only the matrices whose rank changes are written."""
        matrices = prunable_weights(self.model)
        for name in self.layers:
            rank = self.space.active_rank(name, ranks)
            if self.active[name] != rank:
                matrices[name].copy_(self._deployed(name, rank))
                self.active[name] = rank

    @torch.no_grad()
    def restore(self) -> None:
        """Write the pruned weights into the model, whatever it has now."""
        for name, weight in prunable_weights(self.model).items():
            weight.copy_(self.pruned[name])
        self.active = dict.fromkeys(self.layers, 0)

    def _deployed(self, name: str, rank: int) -> Tensor:
        """The weight that the mode deploys with a slice, in a workspace, as the checkpoint has it. The same bits as a
        merge of the slice as an adapter of its own."""
        layer, weight = self.layers[name], self.pruned[name]
        if not rank:
            return weight
        built = layer.impl.effective(layer.oriented(weight), layer.A[:rank], layer.B[:, :rank], layer.scaling)
        built = layer.oriented(built)
        return built if self.last_masks is None else built.mul_(self.last_masks[name])

    def save(self, ranks: Ranks, folder: Path) -> None:
        """Write a slice as an adapter of its own, in PEFT's format with a rank for each module, and its marker.

        PEFT scales by alpha / r of the module, so alpha shrinks with the rank and s stays. A module of rank 0 has no
        adapter.
        """
        folder.mkdir()
        tensors, sliced = {}, {}
        for name, layer in self.layers.items():
            rank, module = self.space.active_rank(name, ranks), name.removesuffix(".weight")
            if rank:
                sliced[module] = (rank, layer.scaling * rank)
                tensors[f"base_model.model.{module}.lora_A.weight"] = layer.A[:rank].contiguous()
                tensors[f"base_model.model.{module}.lora_B.weight"] = layer.B[:, :rank].contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        written = LoraConfig(
            r=max(rank for rank, _ in sliced.values()),
            target_modules=sorted(sliced),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(layer.transposed for layer in self.layers.values()),
            # PEFT reads the names as regular expressions.
            rank_pattern={re.escape(module): rank for module, (rank, _) in sliced.items()},
            alpha_pattern={re.escape(module): alpha for module, (_, alpha) in sliced.items()},
        )
        written.save_pretrained(str(folder))
        write_json(folder / MARKER, vars(self.marker))
