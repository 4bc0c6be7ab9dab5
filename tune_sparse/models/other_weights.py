"""The weights of a model that are not pruned, by kind: biases, norms, embeddings, head.

A tied head is one tensor with the embeddings, which belongs to both kinds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from tune_sparse.config.protocol import OTHER_WEIGHTS
from tune_sparse.models.architectures import architecture_named, list_matrices, matrix_sizes, pruned_weights
from tune_sparse.models.dims import ModelDims

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def other_parameters(model: PreTrainedModel, kinds: Collection[str]) -> dict[str, nn.Parameter]:
    """{checkpoint tensor name: the model's own parameter} of some kinds, each once, in the order of the model."""
    pruned = {matrix.name for matrix in list_matrices(model)}
    head = model.get_output_embeddings().weight
    chosen = {}
    for name, parameter in model.named_parameters():
        found = _kinds(model, name, parameter) | ({"head"} if parameter is head else set())
        if name not in pruned and found & set(kinds):
            chosen[name] = parameter
    return chosen


def _kinds(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> set[str]:
    """The kinds of a parameter by its layer. OPT projects narrow embeddings into its width, and out of it."""
    layer_name, _, leaf = name.rpartition(".")
    layer = model.get_submodule(layer_name)
    is_matrix = getattr(layer, "weight", parameter).ndim == 2
    if leaf == "bias" and is_matrix:
        return {"bias"}
    if not is_matrix:
        return {"norm"}
    if layer_name.endswith("project_out"):
        return {"head"}
    return {"embeddings"} if _is_embedding(layer) or layer_name.endswith("project_in") else set()


def _is_embedding(layer: nn.Module) -> bool:
    from torch import nn

    return isinstance(layer, nn.Embedding)


def all_weights(dims: ModelDims) -> int:
    """Weights of the whole model: the prunable ones, routers, and every other kind."""
    routers = dims.num_layers * dims.num_experts * dims.hidden_size if dims.num_experts > 1 else 0
    return pruned_weights(dims) + routers + count_other_weights(dims, OTHER_WEIGHTS)


def count_other_weights(dims: ModelDims, kinds: Iterable[str]) -> int:
    """Weights of some kinds, each counted once. Exact but for the optional biases of a Llama, which are left out, and
    for the last norm that OPT-350m does without."""
    return sum(_sizes(dims, kinds).values())


def _sizes(dims: ModelDims, kinds: Iterable[str]) -> dict[str, int]:
    """{tensor, or tensors of one kind: weights}"""
    entry, tokens = architecture_named(dims.architecture), dims.vocab_size * dims.embedding_width
    projected = dims.embedding_width * dims.hidden_size if dims.embedding_width != dims.hidden_size else 0
    head = "tokens" if dims.tied_embeddings else "head"
    rows = sum(size[0] for size in matrix_sizes(dims).values()) if entry.has_biases else 0
    positions = 0 if entry.position_offset is None else dims.max_positions + entry.position_offset
    norms = (2 * dims.num_layers + 1) * dims.hidden_size * entry.vectors_of_norm
    by_kind: Mapping[str, dict[str, int]] = {
        "bias": {"bias": rows},
        "norm": {"norm": norms},
        "embeddings": {"tokens": tokens, "positions": positions * dims.hidden_size, "project_in": projected},
        "head": {head: tokens, "project_out": projected},
    }
    return {name: size for kind in kinds for name, size in by_kind[kind].items()}
