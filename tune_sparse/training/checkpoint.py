"""Checkpoints of unfinished trainings: read back, a training resumes to the same bits on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor
from torch.optim import Optimizer

from tune_sparse.files import atomic_file


def save_training(
    path: Path, identity: str, parameters: Sequence[Tensor], optimizer: Optimizer, so_far: dict[str, Any]
) -> None:
    """Write parameters, optimizer and random state, and `so_far`, whatever plain values the caller goes on with.

    `identity` says whose training it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "identity": identity,
        "parameters": [parameter.data for parameter in parameters],
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "so_far": so_far,
    }
    with atomic_file(path) as partial:
        torch.save(state, partial)


def restore_into(
    path: Path, identity: str, parameters: Sequence[Tensor], optimizer: Optimizer
) -> dict[str, Any] | None:
    """Put a checkpoint into `parameters`, `optimizer` and the random state; returns `so_far`.

    None, and nothing is changed, where there is no checkpoint of this training. Raises `BrokenStateError` for one
    that cannot be read whole.
    """
    if not path.exists():
        return None
    try:
        _check_unchanged(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"], [tuple(tensor.shape) for tensor in state["parameters"]]
        optimizer_state, so_far = state["optimizer"], state["so_far"]
    except Exception as error:  # what torch raises on a broken file is not declared: pickle, zip, key, runtime, EOF
        why = str(error).partition(". ")[0]  # the rest of what torch says is how to run code that the file brings
        raise BrokenStateError(f"{path} cannot be read whole ({type(error).__name__}: {why})") from error
    if found != (identity, [tuple(parameter.shape) for parameter in parameters]):
        return None
    for parameter, tensor in zip(parameters, state["parameters"], strict=True):
        parameter.data.copy_(tensor)
    optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(state["random"])
    if state["cuda_random"]:
        torch.cuda.set_rng_state_all(state["cuda_random"])
    return dict(so_far)


def _check_unchanged(path: Path) -> None:
    """torch writes a zip file with the checksum of every part, and does not look at them when it reads."""
    with ZipFile(path) as parts:
        if (changed := parts.testzip()) is not None:
            raise ValueError(f"{changed} changed")


class BrokenStateError(Exception):
    """A checkpoint that was cut short or changed."""
