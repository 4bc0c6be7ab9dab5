"""Sparse-to-sparse adapters under structured masks, trained on the physically smaller model.

Where M keeps whole rows r, or whole columns c, of W: (O, I), plain LoRA on the block that is left computes what the
masked layer does: W[r] + s B[r] A, or W[:, c] + s B A[:, c]. So masked heads and channels are cut out of the model
for the training, with the same lines of A: (R, I) and B: (O, R), and put back after it, as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from tune_sparse.errors import RunError
from tune_sparse.lora.layer import ADAPTER, SparseLora, apply_update_masks, sparse_lora_layers
from tune_sparse.lora.masked_linear import LoraImpl
from tune_sparse.models.architectures import architecture_named
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.compact import KeptInPartError, find_structure
from tune_sparse.pruning.masks import Masks

PROBE_TOKENS = 16


@dataclass(frozen=True)
class Cut:
    """The lines that stay of a matrix: rows where `along` is 0, columns where it is 1."""

    along: int
    kept: Tensor
    """Their positions, ascending."""
    whole: int
    """All lines."""

    def cut_out(self, whole: Tensor) -> Tensor:
        return whole.index_select(self.along, self.kept.to(whole.device))

    def put_back(self, block: Tensor) -> Tensor:
        """The block among lines of zeros."""
        shape = list(block.shape)
        shape[self.along] = self.whole
        return block.new_zeros(shape).index_copy_(self.along, self.kept.to(block.device), block)


Cuts = Mapping[str, Cut]
"""{matrix: what stays of it}"""


def find_cuts(dims: ModelDims, masks: Masks) -> Cuts | None:
    """Find what `masks` leave of every matrix; None where they mask a part of a key/value group or channel, and for a
    class that computes nothing without its heads.

    The masks alone decide, so that a run trains alike on every device. No block is without a group or a channel:
    `mask_violations` refuses masks that leave a layer nothing.
    """
    architecture = architecture_named(dims.architecture)
    if not architecture.heads_shrink:
        return None
    matrices = architecture.matrices(masks)
    try:
        structure = find_structure(dims, matrices, masks)
    except KeptInPartError:
        return None
    cuts = {}
    for matrix in matrices:
        along, kept = structure.positions(matrix)
        cuts[matrix.name] = Cut(along, kept, matrix.shape(dims)[along])
    return cuts


@dataclass(frozen=True)
class Whole:
    """The rest of a whole model, which is not seen in a smaller one."""

    impls: dict[str, LoraImpl]
    biases: dict[str, Tensor]
    """Of cut rows: what is pruned of them computes nothing, but the next run wants it."""


def shrink_into(adapted: PeftModel, cuts: Cuts) -> Whole:
    """Cut masked heads and channels out of a pruned model and its adapters, in place and matrix by matrix.

    It computes the same function then, as plain LoRA.
    """
    impls = {name: layer.impl for name, layer in sparse_lora_layers(adapted)}
    biases = {name: bias.data for name, cut in cuts.items() if (bias := _cut_bias(adapted, name, cut)) is not None}
    _replace_into(adapted, cuts, Cut.cut_out)
    apply_update_masks(adapted, None)
    return Whole(impls, biases)


def expand_into(adapted: PeftModel, cuts: Cuts, whole: Whole) -> None:
    """Put back what `shrink_into` cut out, in place and matrix by matrix: weights and factors are 0 there."""
    _replace_into(adapted, cuts, Cut.put_back)
    for name, layer in sparse_lora_layers(adapted):
        layer.impl = whole.impls[name]
    for name, values in whole.biases.items():
        bias = _cut_bias(adapted, name, cuts[name])
        assert bias is not None
        bias.data = values


@contextmanager
def shrunk(adapted: PeftModel, cuts: Cuts) -> Iterator[None]:
    """Let a pruned model and its adapters be small in this context, in place. An exception leaves them so.

    Raises `RunError` for a model class that does not compute the same without its masked heads.
    """
    expected = _after_first_block(adapted)
    whole = shrink_into(adapted, cuts)
    _check_same(_after_first_block(adapted), expected)
    yield
    expand_into(adapted, cuts, whole)


@torch.no_grad()
def _after_first_block(adapted: PeftModel) -> Tensor:
    """The activations after the first block, where rounding has not added up yet: (1, T, hidden size).

    All blocks are of one class, so that one shows whether it reads the number of its heads off its matrices.
    """
    model = adapted.get_base_model().eval()
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.vocab_size
    activations: Tensor = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1]
    return activations


def _check_same(found: Tensor, expected: Tensor) -> None:
    """Half of the precision's digits must agree."""
    lost = float((found.double() - expected.double()).norm() / expected.double().norm())
    limit = math.sqrt(torch.finfo(expected.dtype).eps)
    if not lost <= limit:
        raise RunError(
            f"a model without its masked heads and channels must compute what the whole one does within {limit:.1g}, "
            f"got {lost:.2g} after the first block. Set masked_lora_impl=effective-weight, or install the pinned "
            "version of transformers."
        )


@torch.no_grad()
def _replace_into(adapted: PeftModel, cuts: Cuts, change: Callable[[Cut, Tensor], Tensor]) -> None:
    for name, cut in cuts.items():
        for linear in _cut_linears(adapted, name, cut):
            linear.weight.data = change(cut, linear.weight.data)
            linear.out_features, linear.in_features = linear.weight.shape
        if (bias := _cut_bias(adapted, name, cut)) is not None:
            bias.data = change(cut, bias.data)


def _cut_linears(adapted: PeftModel, name: str, cut: Cut) -> list[nn.Linear]:
    """The layer of a matrix and, where it has an adapter, the factor with the lines that are cut: B has the rows, A the
    columns."""
    layer = adapted.get_base_model().get_submodule(name.removesuffix(".weight"))
    if isinstance(layer, SparseLora):
        return [layer.base_layer, (layer.lora_A if cut.along else layer.lora_B)[ADAPTER]]
    assert isinstance(layer, nn.Linear)
    return [layer]


def _cut_bias(adapted: PeftModel, name: str, cut: Cut) -> nn.Parameter | None:
    return None if cut.along else _cut_linears(adapted, name, cut)[0].bias
