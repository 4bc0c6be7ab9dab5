"""Inputs of a run in memory: its model with the dense weights, and its task's examples as tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainables.hardware import device
from trainables.inputs import load_planned_checkpoint, load_planned_splits
from tune_sparse.data.splits import Encoded, encode_training
from tune_sparse.data.tasks import tasks_named
from tune_sparse.evaluation.scoring import EvalSet, encode_test
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import find_folder, load_model, load_tokenizer, prunable_weights
from tune_sparse.models.dense_weights import DenseWeights
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.local_copy import local_weight_files
from tune_sparse.models.safetensors_io import TensorFiles


@dataclass(frozen=True)
class Examples:
    """A task's examples as one model's tokens."""

    train: list[Encoded]
    selection: list[Encoded]
    tests: tuple[EvalSet, ...]


@dataclass(frozen=True)
class LoadedModel:
    """One model in memory, and in its checkpoint the dense weights that pruning and merging overwrite."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dims: ModelDims
    dense_weights: DenseWeights


def load(run: Run) -> LoadedModel:
    """Read the run's model in its precision, onto the device of this process.

    Raises `NotReadyError` for a checkpoint that is not the planned one, or changes while it is read.
    """
    # Opened before its fingerprint is taken: what changes after that is seen when it is read.
    tensors = TensorFiles(local_weight_files(find_folder(run.model_path)))
    checkpoint = load_planned_checkpoint(run)
    dtype, where = getattr(torch, run.protocol.precision), device()
    model = load_model(checkpoint.path, dtype, where, tensors)
    dense_weights = DenseWeights(tensors, tuple(prunable_weights(model)), dtype, where)
    return LoadedModel(model, load_tokenizer(checkpoint.path), checkpoint.dims, dense_weights)


def encode(run: Run, loaded: LoadedModel) -> Examples:
    """Read the examples of the task, or of all tasks of a mixture, and encode them."""
    tokenizer, protocol = loaded.tokenizer, run.protocol.within(loaded.dims.max_positions)
    tasks, splits = tasks_named(run.cell.task), load_planned_splits(run, protocol)
    train, selection = [], []
    for task, split in zip(tasks, splits, strict=True):
        train += encode_training(tokenizer, task, split.train, protocol.max_tokens, protocol.n_train)
        selection += encode_training(tokenizer, task, split.selection, protocol.max_tokens, protocol.n_selection)
    tests = (
        encode_test(tokenizer, task, split.test, protocol, split.shots)
        for task, split in zip(tasks, splits, strict=True)
    )
    return Examples(train, selection, tuple(tests))
