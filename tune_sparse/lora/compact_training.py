"""Sparse-to-sparse adapters under structured masks, trained on the physically smaller model.

Where M keeps whole rows r, or whole columns c, of W: (O, I), plain LoRA on the block that is left computes what the
masked layer does: W[r] + s B[r] A, or W[:, c] + s B A[:, c]. So masked heads and channels are cut out of the model
for the training, with the same lines of A: (R, I) and B: (O, R), and put back after it, as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from tune_sparse.lora.layer import ADAPTER, SparseLora, apply_update_masks, sparse_lora_layers
from tune_sparse.models.architectures import architecture_named
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.compact import KeptInPartError, find_structure
from tune_sparse.pruning.masks import Masks


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
    """Find what `masks` leave of every matrix; None where they mask a part of a key/value group or channel.

    The masks alone decide, so that a run trains alike on every device. No block is without a group or a channel:
    `mask_violations` refuses masks that leave a layer nothing.
    """
    matrices = architecture_named(dims.architecture).matrices(masks)
    try:
        structure = find_structure(dims, matrices, masks)
    except KeptInPartError:
        return None
    cuts = {}
    for matrix in matrices:
        along, kept = structure.positions(matrix)
        cuts[matrix.name] = Cut(along, kept, matrix.shape(dims)[along])
    return cuts


@contextmanager
def shrunk(adapted: PeftModel, cuts: Cuts) -> Iterator[None]:
    """Let a pruned model and its adapters be without what is cut out of them, in place, in this context.

    It computes the same function in it, as plain LoRA. An exception leaves the model small.
    """
    impls = {name: layer.impl for name, layer in sparse_lora_layers(adapted)}
    biases = _replace_into(adapted, cuts, Cut.cut_out)
    apply_update_masks(adapted, None)
    yield
    _replace_into(adapted, cuts, Cut.put_back)
    for name, layer in sparse_lora_layers(adapted):
        layer.impl = impls[name]
    for linear, bias in biases.items():
        linear.bias.data = bias


@torch.no_grad()
def _replace_into(adapted: PeftModel, cuts: Cuts, change: Callable[[Cut, Tensor], Tensor]) -> dict[nn.Linear, Tensor]:
    """Change every matrix, the factor that has its cut lines, B its rows and A its columns, and a bias of rows, in
    place and matrix by matrix. Returns the biases as they were."""
    biases = {}
    for name, cut in cuts.items():
        layer = adapted.get_base_model().get_submodule(name.removesuffix(".weight"))
        linear = layer.base_layer if isinstance(layer, SparseLora) else layer
        assert isinstance(linear, nn.Linear)
        parts = [linear]
        if isinstance(layer, SparseLora):
            parts.append((layer.lora_A if cut.along else layer.lora_B)[ADAPTER])
        for part in parts:
            part.weight.data = change(cut, part.weight.data)
            part.out_features, part.in_features = part.weight.shape
        if linear.bias is not None and not cut.along:
            biases[linear] = linear.bias.data
            linear.bias.data = change(cut, linear.bias.data)
    return biases
