"""Names and rows of Model Zoo's checkpoints beside those of Hugging Face's.

| Hugging Face | Model Zoo |
| --- | --- |
| model.layers.N.self_attn.q_proj | transformer_decoder.layers.N.self_attn.proj_q_dense_layer |
| model.layers.N.mlp.gate_proj | transformer_decoder.layers.N.ffn.ffn.0.linear_layer_for_glu |

and so on. Model Zoo turns neighbouring pairs of a head's rows by the position, Hugging Face a row and the one half a
head away: the rows of q_proj and k_proj are interleaved there, and so must the rows of masks and of B be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.models.architectures import matrix_named

NAMES = {
    "self_attn.q_proj": "self_attn.proj_q_dense_layer",
    "self_attn.k_proj": "self_attn.proj_k_dense_layer",
    "self_attn.v_proj": "self_attn.proj_v_dense_layer",
    "self_attn.o_proj": "self_attn.proj_output_dense_layer",
    "mlp.gate_proj": "ffn.ffn.0.linear_layer_for_glu",
    "mlp.up_proj": "ffn.ffn.0.linear_layer",
    "mlp.down_proj": "ffn.ffn.1.linear_layer",
}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
TIED_NORM = "ln_f.weight"
"""Another name of `transformer_decoder.norm.weight`."""
OTHER_NAMES = {
    "embedding_layer.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer_decoder.norm.weight": "model.norm.weight",
    TIED_NORM: "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
NORMS = {"norm1": "input_layernorm", "norm3": "post_attention_layernorm"}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "filter_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layer_norm_epsilon",
}
"""{of Hugging Face's config: of Model Zoo's}"""
ACTIVATIONS = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu"}


def cerebras_name(weight: str) -> str:
    """Name a matrix in Model Zoo: model.layers.0.mlp.up_proj.weight -> transformer_decoder.layers.0.ffn.ffn.0..."""
    matrix = matrix_named(weight)
    assert matrix is not None, weight
    return f"transformer_decoder.layers.{matrix.block}.{NAMES[matrix.layer]}.weight"


def hugging_face_name(weight: str) -> str:
    """The inverse of `cerebras_name`."""
    _, layers, number, *module, kind = weight.split(".")
    back = {theirs: ours for ours, theirs in NAMES.items()}
    return ".".join(("model", layers, number, back[".".join(module)], kind))


def interleaved(weight: str, rows: Tensor, head_dim: int) -> Tensor:
    """Rows (O, ...) of the matrix `weight`, or of its mask or its B, in the order of Model Zoo."""
    if not _is_rotated(weight):
        return rows
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def separated(weight: str, rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleaved`."""
    if not _is_rotated(weight):
        return rows
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


def _is_rotated(weight: str) -> bool:
    matrix = matrix_named(weight)
    return matrix is not None and matrix.layer in ROTATED


def tensor_name(name: str) -> str | None:
    """The Hugging Face name of any tensor of a Llama or Mistral in Model Zoo, None for what is no weight of it."""
    name = name.removeprefix("model.")
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, *rest = name.split("transformer_decoder.layers.")
    number, _, module = rest[0].partition(".") if rest else ("", "", "")
    if module.removesuffix(".weight") in NORMS:
        return f"model.layers.{number}.{NORMS[module.removesuffix('.weight')]}.weight"
    return hugging_face_name(name) if module.removesuffix(".weight") in NAMES.values() else None


def zoo_tensor_name(name: str) -> str | None:
    """The inverse of `tensor_name`; None for what has no place in a Llama or Mistral of Model Zoo."""
    others = {ours: theirs for theirs, ours in OTHER_NAMES.items() if theirs != TIED_NORM}
    if name in others:
        return others[name]
    matrix = matrix_named(name)
    if matrix is not None and matrix.layer in NAMES and name.endswith(f".{matrix.layer}.weight"):
        return cerebras_name(name)
    start, _, norm = name.removesuffix(".weight").rpartition(".")
    theirs = next((theirs for theirs, ours in NORMS.items() if ours == norm), None)
    return theirs and f"transformer_decoder.{start.removeprefix('model.')}.{theirs}.weight"


def hugging_face_config(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config of Hugging Face for what `params.yaml` says of a model, as Model Zoo's own converter has it.

    Raises `InputError` that names `source` for a model that is no Llama or Mistral, or that lacks a size.
    """
    model = settings.get("trainer", {}).get("init", settings).get("model", {})
    if model.get("name") not in CLASSES:
        raise InputError(f"{source} must describe a model named {' or '.join(CLASSES)}, it has {model.get('name')!r}.")
    if missing := sorted(theirs for theirs in SIZES.values() if theirs not in model):
        raise InputError(f"{source} must have the sizes of its model, it lacks {', '.join(missing)}. Add them.")
    _check_computes_alike(model, source)
    heads, extra = model["num_heads"], model.get("extra_attention_params") or {}
    window = {"sliding_window": model.get("attention_sliding_window_length")} if model["name"] == "mistral" else {}
    return window | {
        **{ours: model[theirs] for ours, theirs in SIZES.items()},
        "model_type": model["name"],
        "architectures": [CLASSES[model["name"]]],
        "hidden_act": ACTIVATIONS[model["nonlinearity"]],
        "num_key_value_heads": extra.get("num_kv_groups", heads),
        "initializer_range": model.get("initializer_range", 0.02),
        "tie_word_embeddings": model.get("share_embedding_weights", True),
        "rope_theta": model.get("rope_theta", 10_000.0),
        "rope_scaling": _rope_scaling(model),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _rope_scaling(model: Mapping[str, Any]) -> dict[str, Any] | None:
    factor = model.get("pos_scaling_factor", 1.0)
    if factor == 1.0:
        return None
    scaling = {"rope_type": model.get("pos_scaling_type", "linear"), "factor": factor}
    return scaling | (model.get("pos_scaling_extra_args") or {})


def _check_computes_alike(model: Mapping[str, Any], source: str) -> None:
    """Raise `InputError` for what a Llama or Mistral of Hugging Face does not compute."""
    biases = ("use_projection_bias_in_attention", "use_ffn_bias_in_attention", "use_ffn_bias")
    head_dim = model["hidden_size"] // model["num_heads"]
    rules = {
        "norm_type rmsnorm": (model.get("norm_type"), ("rmsnorm",)),
        "position_embedding_type rotary": (model.get("position_embedding_type"), ("rotary",)),
        f"rotary_dim {head_dim}": (model.get("rotary_dim"), (head_dim,)),
        f"nonlinearity {', '.join(ACTIVATIONS)}": (model.get("nonlinearity"), tuple(ACTIVATIONS)),
        **{f"{bias} false": (model.get(bias, True), (False,)) for bias in biases},
        "use_bias_in_output false": (model.get("use_bias_in_output", False), (False,)),
    }
    for wanted, (found, allowed) in rules.items():
        if found not in allowed:
            raise InputError(f"{source} must have {wanted}, as every Llama and Mistral, it has {found!r}.")
