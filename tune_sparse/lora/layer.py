"""LoRA on pruned weights inside PEFT: the layer, its injection, and the merge.

W: (O, I) frozen and already pruned, A: (R, I), B: (O, R), M: (O, I) keep-mask, s = alpha / R. GPT-2 stores W and M
transposed, as (I, O): a layer orients what it is given, as views.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tune_sparse.config import Protocol
from tune_sparse.lora.masked_linear import EffectiveWeight, LoraImpl, Plain, Workspace, choose_impl
from tune_sparse.models.architectures import find_architecture
from tune_sparse.pruning.masks import Masks
from tune_sparse.pruning.seeded import seeded_uniform

ADAPTER = "default"
"""PEFT's name for the only adapter."""


class SparseLora(PeftLinear):
    """y = (W + s(BA)⊙M) x + b, M absent where the mode does not mask the update; `impl` computes it.

    Dropout p > 0 acts on the adapter's input, as in PEFT: y = Wx + b + (s(BA)⊙M) dropout(x), exact and slower.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.impl: LoraImpl = Plain()
        self.active_rank: int | None = None
        """Only so many rows of A and columns of B compute, s unchanged: a slice. None for all."""

    def oriented(self, stored: Tensor) -> Tensor:
        """(O, I) from the layout of the checkpoint, or back: a view."""
        return stored.T if isinstance(self.base_layer, Conv1D) else stored

    @property
    def frozen(self) -> Tensor:
        """W, to be read and written: (O, I)."""
        return self.oriented(self.base_layer.weight)

    @property
    def keep_mask(self) -> Tensor | None:
        """M, or None where the update is not masked."""
        return self.impl.mask(self.frozen)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s, of the active slice."""
        A, B, scaling = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]
        rank = self.active_rank
        return (A, B, scaling) if rank is None else (A[:rank], B[:, :rank], scaling)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight that this layer computes with, in its workspace until that is used again: (O, I)."""
        weight, impl = self.frozen, self.impl
        if not isinstance(impl, EffectiveWeight):
            impl = EffectiveWeight(weight, self.keep_mask, Workspace())
        return impl.effective(weight, *self.factors())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[ADAPTER]
        if self.training and not isinstance(dropout, nn.Identity):
            return self.base_layer(x) + self._low_rank_update(dropout(x))
        return self.impl(x, self.frozen, self.base_layer.bias, *self.factors())

    def _low_rank_update(self, x: Tensor) -> Tensor:
        A, B, scaling = self.factors()
        if self.keep_mask is None:
            return F.linear(F.linear(x, A.to(x.dtype)), (scaling * B).to(x.dtype))
        return F.linear(x, self.get_delta_weight(ADAPTER).to(x.dtype))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s(BA)⊙M in the adapter's float32: what PEFT's own merge would add."""
        return self.update_rows()(slice(None))

    def update_rows(self) -> Callable[[slice], Tensor]:
        """Make a function that computes some rows of s(BA)⊙M, in float32."""
        A, B, scaling = self.factors()
        mask = self.keep_mask

        def some_rows(rows: slice) -> Tensor:
            update = scaling * (B[rows] @ A)
            return update if mask is None else update * mask[rows]

        return some_rows


def adapt_model(
    model: PreTrainedModel,
    protocol: Protocol,
    update_masks: Masks | None,
    seed: int,
    modules: Sequence[str] | None = None,
) -> PeftModel:
    """Put adapters into `modules` of `model`, in place, by default all that are pruned; `update_masks`, in the layout
    of the checkpoint, mask their update.

    B starts at zero and A uniform in ±1/sqrt(I) (Hu et al. 2021, arXiv:2106.09685, and PEFT), from `seed` and the
    layer's name alone. PEFT's own initialisation depends on the layers that came before.
    """
    architecture = find_architecture(model)
    config = LoraConfig(
        r=protocol.lora_rank,
        lora_alpha=protocol.lora_alpha,
        lora_dropout=protocol.lora_dropout,
        target_modules=list(architecture.modules if modules is None else modules),
        fan_in_fan_out=architecture.transposed,
        task_type="CAUSAL_LM",
    )
    adapted = inject(model, config)
    apply_update_masks(adapted, update_masks, protocol.masked_lora_impl)
    for name, layer in sparse_lora_layers(adapted):
        A, B, _ = layer.factors()
        A.data.copy_((2 * seeded_uniform(A.shape, f"{seed}/adapter/{name}") - 1) / math.sqrt(A.shape[1]))
        B.data.zero_()
    return adapted


def inject(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put `SparseLora` layers into `model` where the config says, in place; none is masked yet."""
    config._register_custom_module({nn.Linear: SparseLora, Conv1D: SparseLora})
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def apply_update_masks(adapted: PeftModel, masks: Masks | None, requested: str = "auto") -> None:
    """Choose the implementation of every adapted layer, in place: its update masked by `masks`, or not without them."""
    workspace = Workspace()
    for name, layer in sparse_lora_layers(adapted):
        rank, mask = layer.r[ADAPTER], layer.oriented(masks[name]) if masks else None
        layer.impl = choose_impl(layer.frozen, mask, rank, workspace, requested)


def count_impls(adapted: PeftModel) -> Counter[str]:
    """Count the layers of each implementation."""
    return Counter(layer.impl.name for _, layer in sparse_lora_layers(adapted))


def sparse_lora_layers(adapted: PeftModel) -> Iterator[tuple[str, SparseLora]]:
    """(name of the weight in the checkpoint, layer) of every adapted layer."""
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, SparseLora):
            yield f"{name}.weight", module
