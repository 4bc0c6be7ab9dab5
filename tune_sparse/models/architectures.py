"""The matrices that are pruned, by model class: their names, roles and sizes, one table entry a class.

Matrices are named by the checkpoint's tensors and keep the checkpoint's layout, even where a model in memory fuses
them (Mixtral's experts) or where the checkpoint stores them transposed (GPT-2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, cast

from tune_sparse.errors import InputError
from tune_sparse.models.dims import ModelDims

if TYPE_CHECKING:
    from torch import Tensor, nn

Role = Literal["q", "kv", "qkv", "o", "up", "down"]
"""The channels of a matrix (O, I), heads or feed-forward channels, by the part that it plays.

q, kv: rows of heads. qkv: query, key and value rows one after the other. o: columns of heads. up (and gate): a row
for each feed-forward channel. down: a column for each feed-forward channel."""

INPUTS: dict[Role, str] = {
    "q": "attention",
    "kv": "attention",
    "qkv": "attention",
    "o": "heads",
    "up": "feed-forward",
    "down": "channels",
}
"""The input of a matrix: matrices of one block and expert with the same input share its statistics."""


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
    def input_key(self) -> tuple[int, int | None, str]:
        """Names what it reads: equal for matrices with the same input."""
        return self.block, self.expert, INPUTS[self.role]

    @property
    def module(self) -> str:
        """The last part of the layer's name: q_proj, ..."""
        return self.layer.rsplit(".", 1)[-1]

    @property
    def is_attention(self) -> bool:
        return self.role not in ("up", "down")

    @property
    def has_channel_columns(self) -> bool:
        """Its heads or feed-forward channels are columns, not rows."""
        return self.role in ("o", "down")

    def size(self, dims: ModelDims) -> tuple[int, int]:
        """(O, I) in a model of these dims."""
        queries, keys = dims.query_rows, dims.key_rows
        rows = {"q": queries, "kv": keys, "qkv": queries + 2 * keys, "o": queries}
        channels = rows.get(self.role, dims.intermediate_size)
        return (dims.hidden_size, channels) if self.has_channel_columns else (channels, dims.hidden_size)

    def shape(self, dims: ModelDims) -> tuple[int, int]:
        """Its shape in the checkpoint: (O, I), or (I, O) where it is stored transposed."""
        rows, columns = self.size(dims)
        return (columns, rows) if self.transposed else (rows, columns)

    def oriented(self, stored: Tensor) -> Tensor:
        """(O, I) from the checkpoint's layout, or back: the same data."""
        return stored.T if self.transposed else stored


@dataclass(frozen=True)
class Architecture:
    """blocks: the list of blocks in a checkpoint's names. layers: {name within a block: role}, `*` for an expert."""

    blocks: str
    layers: Mapping[str, Role]
    transposed: bool = False
    channels: str = "intermediate_size"
    """The config's name for the number of feed-forward channels."""
    heads_shrink: bool = True
    """Stock transformers can load fewer heads: heads x head size may differ from the hidden size."""
    heads_divide: bool = False
    """Stock transformers wants a number of heads that divides the hidden size all the same."""
    has_biases: bool = False
    """Its pruned layers add a bias to each row; of a Llama that is left to its config."""
    vectors_of_norm: int = 1
    """Its norms have a scale, or a scale and a shift."""
    position_offset: int | None = None
    """Its positions are learned: rows before the first one. None where they are computed."""

    def matrices(self, names: Iterable[str]) -> list[Matrix]:
        """The pruned matrices among the tensors of a checkpoint: block by block, in the order of `layers`."""
        order = {layer: number for number, layer in enumerate(self.layers)}
        found = [matrix for name in names if (matrix := self.matrix(name))]
        return sorted(found, key=lambda m: (m.block, m.expert or 0, order[m.layer]))

    def expected(self, dims: ModelDims) -> list[Matrix]:
        """The pruned matrices of a model of these dims, in the order of `matrices`."""
        names = (
            f"{self.blocks}.{block}.{layer}.weight".replace("*", str(expert))
            for block in range(dims.num_layers)
            for layer in self.layers
            for expert in range(dims.num_experts if "*" in layer else 1)
        )
        return self.matrices(names)

    def within_block(self, name: str) -> tuple[int, str] | None:
        """(block, name within it) of a tensor of a block."""
        # A checkpoint of the bare decoder lacks the first part of the names.
        blocks = re.escape(self.blocks.rsplit(".", 1)[-1])
        found = re.fullmatch(rf"(?:.+\.)?{blocks}\.(\d+)\.(.+)", name)
        return (int(found[1]), found[2]) if found else None

    def matrix(self, name: str) -> Matrix | None:
        """The pruned matrix that a checkpoint's tensor is, or None."""
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
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "kv",
    "self_attn.v_proj": "kv",
    "self_attn.o_proj": "o",
}
GATED: dict[str, Role] = {"mlp.gate_proj": "up", "mlp.up_proj": "up", "mlp.down_proj": "down"}
EXPERT: dict[str, Role] = {
    "block_sparse_moe.experts.*.w1": "up",
    "block_sparse_moe.experts.*.w3": "up",
    "block_sparse_moe.experts.*.w2": "down",
}
GPT2: dict[str, Role] = {
    "attn.c_attn": "qkv",
    "attn.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
OPT: dict[str, Role] = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "kv",
    "self_attn.v_proj": "kv",
    "self_attn.out_proj": "o",
    "fc1": "up",
    "fc2": "down",
}

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("model.layers", ATTENTION | GATED, heads_divide=True),
    "MistralForCausalLM": Architecture("model.layers", ATTENTION | GATED),
    "MixtralForCausalLM": Architecture("model.layers", ATTENTION | EXPERT),
    "GPT2LMHeadModel": Architecture(
        "transformer.h",
        GPT2,
        transposed=True,
        channels="n_inner",
        heads_shrink=False,
        has_biases=True,
        vectors_of_norm=2,
        position_offset=0,
    ),
    "OPTForCausalLM": Architecture(
        "model.decoder.layers",
        OPT,
        channels="ffn_dim",
        heads_shrink=False,
        has_biases=True,
        vectors_of_norm=2,
        position_offset=2,
    ),
}

PRUNED = tuple(layer.rsplit(".", 1)[-1] for layer in ATTENTION | GATED)
"""Linear layers that a sweep adapts; it trains Llama and Mistral models."""


def architecture_named(name: str) -> Architecture:
    """The entry of a model class. Raises `InputError` for a class that the table lacks."""
    if name not in ARCHITECTURES:
        raise InputError(f"the class of a model must be {' or '.join(ARCHITECTURES)}, got {name}.")
    return ARCHITECTURES[name]


@cache
def matrix_named(name: str) -> Matrix | None:
    """The pruned matrix that a tensor is, by its name alone, or None: no two classes read one name differently."""
    return next((found for entry in ARCHITECTURES.values() if (found := entry.matrix(name))), None)


@cache
def matrix_sizes(dims: ModelDims) -> Mapping[str, tuple[int, int]]:
    """{matrix: (O, I)} of every pruned matrix of a model of these dims."""
    return {matrix.name: matrix.size(dims) for matrix in architecture_named(dims.architecture).expected(dims)}


def pruned_weights(dims: ModelDims) -> int:
    """Weights of all prunable matrices."""
    return sum(rows * columns for rows, columns in matrix_sizes(dims).values())


def adapter_weights(dims: ModelDims, rank: int) -> int:
    """Weights of LoRA adapters of `rank` on every prunable matrix: R (I + O) each."""
    return rank * sum(rows + columns for rows, columns in matrix_sizes(dims).values())


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
    """Split one parameter of a model in memory into the tensors of its checkpoint, as views.

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
