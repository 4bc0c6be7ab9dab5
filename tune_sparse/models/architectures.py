"""Where each model class keeps the matrices that are pruned: one table entry a class.

Matrices are named by the checkpoint's tensors and keep the checkpoint's layout, even where a model in memory fuses
them (Mixtral's experts) or where the checkpoint stores them transposed (GPT-2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from tune_sparse.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

Role = Literal["queries", "keys", "fused", "output", "rows", "columns"]
"""What the lines of a matrix (O, I) belong to.

queries, keys (and values): rows of heads. fused: query, key and value rows one after the other. output: columns of
heads. rows: a feed-forward channel each. columns: a feed-forward channel each."""

INPUTS: dict[Role, str] = {
    "queries": "attention",
    "keys": "attention",
    "fused": "attention",
    "output": "heads",
    "rows": "feed-forward",
    "columns": "channels",
}
"""What a matrix reads: those of one block and expert that read the same share their input statistics."""


@dataclass(frozen=True)
class Matrix:
    """One pruned matrix of a checkpoint."""

    name: str
    """The checkpoint's tensor."""
    block: int
    layer: str
    expert: int | None
    role: Role
    transposed: bool
    """Stored as (I, O), not (O, I)."""

    @property
    def source(self) -> tuple[int, int | None, str]:
        """Names what it reads: equal for matrices with the same input."""
        return self.block, self.expert, INPUTS[self.role]

    def oriented(self, stored: Tensor) -> Tensor:
        """(O, I) from the checkpoint's layout, or back: the same data."""
        return stored.T if self.transposed else stored


@dataclass(frozen=True)
class Architecture:
    """blocks: the list of blocks in a checkpoint's names. layers: {name within a block: role}, `*` for an expert."""

    blocks: str
    layers: Mapping[str, Role]
    gated: bool = True
    """The feed-forward part has two matrices of rows."""
    transposed: bool = False
    channels: str = "intermediate_size"
    """What the config calls the number of feed-forward channels."""
    heads_shrink: bool = True
    """Stock transformers can load fewer heads: heads x head size may differ from the hidden size."""
    heads_divide: bool = False
    """Stock transformers wants a number of heads that divides the hidden size all the same."""

    def matrices(self, names: Iterable[str]) -> list[Matrix]:
        """The pruned matrices among the tensors of a checkpoint: block by block, in the order of `layers`."""
        order = {layer: number for number, layer in enumerate(self.layers)}
        found = [matrix for name in names if (matrix := self._matrix(name))]
        return sorted(found, key=lambda m: (m.block, m.expert or 0, order[m.layer]))

    def within_block(self, name: str) -> tuple[int, str] | None:
        """(block, name within it) of a tensor of a block."""
        # A checkpoint of the bare decoder lacks the first part of the names.
        blocks = re.escape(self.blocks.rsplit(".", 1)[-1])
        found = re.fullmatch(rf"(?:.+\.)?{blocks}\.(\d+)\.(.+)", name)
        return (int(found[1]), found[2]) if found else None

    def _matrix(self, name: str) -> Matrix | None:
        within = self.within_block(name)
        if within is None:
            return None
        for layer, role in self.layers.items():
            pattern = re.escape(layer).replace(r"\*", r"(?P<expert>\d+)")
            if found := re.fullmatch(rf"{pattern}\.weight", within[1]):
                expert = found.groupdict().get("expert")
                return Matrix(
                    name,
                    block=within[0],
                    layer=layer,
                    expert=None if expert is None else int(expert),
                    role=role,
                    transposed=self.transposed,
                )
        return None


ATTENTION: dict[str, Role] = {
    "self_attn.q_proj": "queries",
    "self_attn.k_proj": "keys",
    "self_attn.v_proj": "keys",
    "self_attn.o_proj": "output",
}
GATED: dict[str, Role] = {"mlp.gate_proj": "rows", "mlp.up_proj": "rows", "mlp.down_proj": "columns"}
EXPERT: dict[str, Role] = {
    "block_sparse_moe.experts.*.w1": "rows",
    "block_sparse_moe.experts.*.w3": "rows",
    "block_sparse_moe.experts.*.w2": "columns",
}
GPT2: dict[str, Role] = {
    "attn.c_attn": "fused",
    "attn.c_proj": "output",
    "mlp.c_fc": "rows",
    "mlp.c_proj": "columns",
}
OPT: dict[str, Role] = {
    "self_attn.q_proj": "queries",
    "self_attn.k_proj": "keys",
    "self_attn.v_proj": "keys",
    "self_attn.out_proj": "output",
    "fc1": "rows",
    "fc2": "columns",
}

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("model.layers", ATTENTION | GATED, heads_divide=True),
    "MistralForCausalLM": Architecture("model.layers", ATTENTION | GATED),
    "MixtralForCausalLM": Architecture("model.layers", ATTENTION | EXPERT),
    "GPT2LMHeadModel": Architecture(
        "transformer.h", GPT2, gated=False, transposed=True, channels="n_inner", heads_shrink=False
    ),
    "OPTForCausalLM": Architecture("model.decoder.layers", OPT, gated=False, channels="ffn_dim", heads_shrink=False),
}

PRUNED = tuple(layer.rsplit(".", 1)[-1] for layer in ATTENTION | GATED)
"""Linear layers that a sweep adapts; it trains Llama and Mistral models."""


def architecture_named(name: str) -> Architecture:
    """The entry of a model class. Raises `InputError` for a class that the table lacks."""
    if name not in ARCHITECTURES:
        raise InputError(f"the class of a model must be {' or '.join(ARCHITECTURES)}, got {name}.")
    return ARCHITECTURES[name]


def find_architecture(model: nn.Module) -> Architecture:
    return architecture_named(type(model).__name__)


def list_matrices(model: nn.Module) -> list[Matrix]:
    """The pruned matrices of a model in memory, named as its checkpoint names them."""
    return find_architecture(model).matrices(_checkpoint_tensors(model))


def read_weights(model: nn.Module) -> dict[str, Tensor]:
    """{checkpoint tensor name: weight in the checkpoint's layout} of every pruned matrix.

    The tensors are the model's own, or views of them: writing into one writes into the model.
    """
    tensors = _checkpoint_tensors(model)
    return {matrix.name: tensors[matrix.name] for matrix in find_architecture(model).matrices(tensors)}


def _checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors |= unfused(name, parameter.data)
    return tensors


def unfused(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """What a checkpoint stores of one parameter of a model in memory, as views.

    transformers 5 renames Mixtral's router and fuses its experts: gate_up_proj is (E, 2 channels, hidden), w1
    before w3, and down_proj is (E, hidden, channels).
    """
    experts, found, layer = name.partition(".mlp.experts.")
    if not found:
        return {name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight"): parameter}
    experts += ".block_sparse_moe.experts"
    parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[layer]
    return {
        f"{experts}.{number}.{part}.weight": view
        for number, expert in enumerate(parameter)
        for part, view in zip(parts, expert.chunk(len(parts)), strict=True)
    }


def list_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a model in memory, in order."""
    return list(cast("nn.ModuleList", model.get_submodule(find_architecture(model).blocks)))
