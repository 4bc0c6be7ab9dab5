"""Names and rows of Model Zoo's checkpoints beside those of Hugging Face's.

| Hugging Face | Model Zoo |
| --- | --- |
| model.layers.N.self_attn.q_proj | transformer_decoder.layers.N.self_attn.proj_q_dense_layer |
| model.layers.N.mlp.gate_proj | transformer_decoder.layers.N.ffn.ffn.0.linear_layer_for_glu |

and so on. Model Zoo turns neighbouring pairs of a head's rows by the position, Hugging Face a row and the one half a
head away: the rows of q_proj and k_proj are interleaved there, and so must the rows of masks and of B be.
"""

from __future__ import annotations

from torch import Tensor

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
OTHER_NAMES = {
    "embedding_layer.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer_decoder.norm.weight": "model.norm.weight",
    "ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
NORMS = {"norm1": "input_layernorm", "norm3": "post_attention_layernorm"}


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
