"""A checkpoint opened to be pruned: its config checked, its tensors read one at a time, its blocks likewise."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tune_sparse.errors import InputError
from tune_sparse.files import aside, replace_folder, write_json
from tune_sparse.models.architectures import Architecture, architecture_named, unfused
from tune_sparse.models.checkpoints import SIDE_FILES, find_folder, load_model, read_config, short_name
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.mdl_writer import replace_by_mdl
from tune_sparse.models.safetensors_io import INDEX, FiniteTensors, TensorFiles, TensorWriter, weight_files
from tune_sparse.pruning.prune_model import Prunable

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose config and tensor names were checked. Its weights are checked as they are read."""

    name: str
    path: Path
    config: PretrainedConfig
    dims: ModelDims
    tensors: FiniteTensors
    prunable: Prunable

    @property
    def architecture(self) -> Architecture:
        return architecture_named(self.dims.architecture)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights, and so of calibration."""
        return self.tensors.dtypes[self.prunable.matrices[0].name]


def open_checkpoint(reference: str) -> OpenCheckpoint:
    """Open a model of any class in `ARCHITECTURES`; no weight is read yet.

    Raises `InputError` for a bad config, a missing or truncated file, or a matrix that is missing or misshapen.
    """
    from transformers import AutoConfig

    folder = find_folder(reference)
    architecture_named((read_config(folder).get("architectures") or ["no class at all"])[0])
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        dims = ModelDims.from_config(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} must be the config of its class: {error}. Fix it.") from error
    tensors = FiniteTensors(weight_files(folder))
    prunable = Prunable.from_weights(tensors, dims)
    _check_complete(folder, prunable)
    return OpenCheckpoint(short_name(reference), folder, config, dims, tensors, prunable)


def _check_complete(folder: Path, model: Prunable) -> None:
    found = {(m.block, m.layer, m.expert) for m in model.matrices}
    for wanted in architecture_named(model.dims.architecture).expected(model.dims):
        if (wanted.block, wanted.layer, wanted.expert) not in found:
            raise InputError(f"a checkpoint needs all its weights, {folder} lacks {wanted.name}. Fetch it again.")
    for matrix in model.matrices:
        shape = matrix.shape(model.dims)
        if model.shapes[matrix.name] != shape:
            raise InputError(
                f"{matrix.name} in {folder} must be {shape}, got {model.shapes[matrix.name]}. Fetch it again."
            )


class StreamedBlocks:
    """The blocks of a checkpoint, one in memory at a time, besides the embeddings."""

    def __init__(self, checkpoint: OpenCheckpoint, dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModel

        self.matrices = checkpoint.prunable.matrices
        self.count = checkpoint.dims.num_layers
        self._checkpoint = checkpoint
        # One block serves all: their tensors are copied into it in turn.
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        config.num_hidden_layers = 1
        self._model = (
            AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").requires_grad_(False).eval()
        )
        self._block: nn.Module = self._model.get_submodule(checkpoint.architecture.blocks.partition(".")[2])[0]
        self._loaded = -1
        own = {id(parameter) for parameter in self._block.parameters()}
        for name, parameter in self._model.named_parameters():
            if id(parameter) not in own:
                stored = name if name in checkpoint.tensors else f"{self._model.base_model_prefix}.{name}"
                self._copy(stored, parameter.data)

    def _copy(self, name: str, own: Tensor) -> None:
        if name not in self._checkpoint.tensors:
            raise InputError(
                f"a checkpoint needs all its weights, {self._checkpoint.path} lacks {name}. Fetch it again."
            )
        own.copy_(self._checkpoint.tensors[name])

    def block(self, number: int) -> nn.Module:
        if number != self._loaded:
            for name, own in self._views(number).items():
                self._copy(name, own)
            self._loaded = number
        return self._block

    def weights(self, number: int) -> Mapping[str, Tensor]:
        """The matrices of the block that was asked for last."""
        assert number == self._loaded
        wanted = {matrix.name for matrix in self.matrices}
        return {name: own for name, own in self._views(number).items() if name in wanted}

    def _views(self, number: int) -> dict[str, Tensor]:
        """{checkpoint tensor: where it goes} of a block."""
        within = {
            found[1]: name
            for name in self._checkpoint.tensors
            if (found := self._checkpoint.architecture.within_block(name)) and found[0] == number
        }
        views: dict[str, Tensor] = {}
        for name, parameter in self._block.named_parameters():
            for part, view in unfused(f".{name}", parameter.data).items():
                views[within.get(part[1:], part[1:])] = view
        return views

    def embed(self, ids: Tensor) -> None:
        self._model(input_ids=ids, use_cache=False)

    def whole(self) -> Any:
        return load_model(self._checkpoint.path, self._model.dtype, torch.device("cpu"))


class PrunedCheckpoint:
    """Writes a checkpoint with pruned matrices: shards of the same names, every other tensor copied first; or a
    `model.mdl` in their place.

    `done` gives the folder its name; as a context it leaves nothing half-written.
    """

    def __init__(self, checkpoint: OpenCheckpoint, folder: Path, is_mdl: bool = False) -> None:
        self._checkpoint, self._folder, self._partial = checkpoint, folder, aside(folder)
        self._is_mdl = is_mdl
        self._partial.mkdir(parents=True)
        self._writers: dict[Path, TensorWriter] = {}
        tensors = checkpoint.tensors
        pruned = checkpoint.prunable.sizes
        for path in weight_files(checkpoint.path):
            names = [name for name in tensors if tensors.paths[name] == path]
            shapes = {name: (tensors.shapes[name], tensors.dtypes[name]) for name in names}
            self._writers[path] = TensorWriter(self._partial / path.name, shapes)
            for name in names:
                if name not in pruned:
                    self.write(name, tensors[name])

    def write(self, name: str, weight: Tensor) -> None:
        self._writers[self._checkpoint.tensors.paths[name]].write(name, weight)

    def done(self) -> None:
        for writer in self._writers.values():
            writer.done()
        shutil.copy(self._checkpoint.path / "config.json", self._partial)
        write_rest(self._checkpoint, self._partial)
        if self._is_mdl:
            replace_by_mdl(self._partial)
        replace_folder(self._partial, self._folder)

    def __enter__(self) -> PrunedCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self._writers.values():
            writer.__exit__()
        shutil.rmtree(self._partial, ignore_errors=True)


def write_rest(checkpoint: OpenCheckpoint, folder: Path) -> None:
    """Copy all but weights and config: the tokenizer, settings, and a new index of the shards."""
    for name in SIDE_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copy(checkpoint.path / name, folder)
    if (checkpoint.path / INDEX).is_file():
        written = TensorFiles([folder / path.name for path in weight_files(checkpoint.path)])
        total = sum(torch.Size(shape).numel() * written.dtypes[name].itemsize for name, shape in written.shapes.items())
        names = {name: path.name for name, path in written.paths.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
