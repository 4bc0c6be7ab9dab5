"""A training step without its numbers: models of any size on a laptop, for what lives in memory at once.

Fake tensors of the simulated device have shapes and kinds alone. The process must know that device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from live_bytes import LiveBytes
from peft import LoraConfig, PeftModel
from simulated_device import DEVICE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig

from tune_sparse.config import Protocol
from tune_sparse.lora.layer import inject, sparse_lora_layers
from tune_sparse.lora.masked_linear import EffectiveWeight, Plain, Workspace
from tune_sparse.models.architectures import ARCHITECTURES
from tune_sparse.training.cross_entropy import summed_cross_entropy
from tune_sparse.training.loop import adamw, in_training

SIZES: dict[str, tuple[type, dict[str, Any]]] = {
    "Llama-2-7B": (LlamaConfig, {"intermediate_size": 11008}),
    "Mistral-7B": (MistralConfig, {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": None}),
}
ROW_TOKENS = 2048


def make_config(model: str, layers: int) -> PretrainedConfig:
    """The true widths of a model, and so many of its blocks."""
    kind, sizes = SIZES[model]
    made: PretrainedConfig = kind(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=layers, num_attention_heads=32, **sizes
    )
    return made


@dataclass(frozen=True)
class FakeStep:
    """A step of one micro-batch, in rows of 2,048 tokens that are all learned, with float32 adapters on bfloat16."""

    model: str
    layers: int
    is_masked: bool
    """The update is, so that layers compute with their effective weight; or they are plain LoRA."""
    activation_checkpointing: bool
    tokens: int = 8192

    def peak_bytes(self) -> int:
        """The bytes of live tensors at their most: the weights, the adapters, their optimizer, and two steps."""
        adapted = _on_meta(make_config(self.model, self.layers))
        with FakeTensorMode(), LiveBytes() as live:
            adapted._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE))
            _choose_impls(adapted, self.is_masked)
            self._train(adapted)
        return live.peak

    def _train(self, adapted: PeftModel) -> None:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer, model = adamw(parameters, Protocol()), adapted.get_base_model()
        ids = torch.zeros(self.tokens // ROW_TOKENS, ROW_TOKENS, dtype=torch.long, device=DEVICE)
        with in_training(model, self.activation_checkpointing):
            for _ in range(2):  # the first one makes what the optimizer remembers
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                loss = summed_cross_entropy(hidden.flatten(0, 1), model.lm_head, ids.flatten())
                del hidden
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()


def _on_meta(config: PretrainedConfig) -> PeftModel:
    AttentionInterface.register("fused", _fused_attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="fused")
        lora = LoraConfig(
            r=16, lora_alpha=32, target_modules=list(ARCHITECTURES["LlamaForCausalLM"].modules), task_type="CAUSAL_LM"
        )
        return inject(model.requires_grad_(False), lora)


def _choose_impls(adapted: PeftModel, is_masked: bool) -> None:
    """As `choose_impl`, which would look at values: a mask without kept zeros takes no memory."""
    workspace = Workspace()
    for _, layer in sparse_lora_layers(adapted):
        layer.impl = EffectiveWeight(layer.base_layer.weight, None, workspace) if is_masked else Plain()
        layer.impl.is_masked = is_masked


def _fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """What CUDA computes for `sdpa` without a mask: no (T, T) matrix is in memory."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2).contiguous(), None
