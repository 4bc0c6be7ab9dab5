"""The weights of a model before anything was pruned: in its checkpoint, read again when they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tune_sparse.models.architectures import read_weights
from tune_sparse.models.safetensors_io import TensorFiles


@dataclass(frozen=True)
class DenseWeights(Mapping[str, Tensor]):
    """{checkpoint tensor name: dense weight} of the prunable matrices, each read from its file when it is asked for.

    Reading raises `NotReadyError` where the file changed since it was opened.
    """

    tensors: TensorFiles
    names: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def folder(self) -> Path:
        """Where they are read from: the checkpoint's own, or that of its copy on this machine."""
        return self.tensors.paths[self.names[0]].parent

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        own = torch.empty(self.tensors.shapes[name], dtype=self.dtype, device=self.device)
        self.tensors.read_into(own, name)
        return own

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def restore_into(self, model: nn.Module) -> None:
        """Write them over what a cell left in the prunable matrices of a model."""
        for name, own in read_weights(model).items():
            self.tensors.read_into(own, name)

    @torch.no_grad()
    def restore_all_into(self, model: nn.Module) -> None:
        """Write every weight of the checkpoint over what a cell left in a model."""
        for name, own in model.named_parameters():
            self.tensors.read_into(own, name)
