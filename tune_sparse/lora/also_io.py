"""Weights that were trained beside adapters or pruned matrices, on disk: a file of its own in their folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.errors import InputError, unknown_name
from tune_sparse.models.safetensors_io import TensorFiles, TensorWriter

ALSO = "trained_also.safetensors"


def write_also(weights: Mapping[str, Tensor], folder: Path) -> None:
    shapes = {name: (weight.shape, weight.dtype) for name, weight in weights.items()}
    with TensorWriter(folder / ALSO, shapes) as writer:
        for name, weight in weights.items():
            writer.write(name, weight.detach())
        writer.done()


@torch.no_grad()
def read_also_into(model: PreTrainedModel, folder: Path) -> None:
    """Write what the folder has into a model without adapters. Raises `InputError` for weights that do not fit it."""
    if not (folder / ALSO).is_file():
        return
    tensors, own = TensorFiles([folder / ALSO]), dict(model.named_parameters())
    for name, shape in tensors.shapes.items():
        if name not in own:
            raise unknown_name("weight trained beside an adapter", name, own)
        if shape != tuple(own[name].shape):
            raise InputError(
                f"weights must fit their model, {name} is {shape} in {folder / ALSO}, the model wants "
                f"{tuple(own[name].shape)}. Give the model that they were trained in."
            )
        tensors.read_into(own[name], name)
