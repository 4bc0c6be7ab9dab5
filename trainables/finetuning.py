"""The mode of a run, whichever it is: set up to be trained, and restored from what it saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from trainables import lora_finetuning, masked_finetuning
from trainables.mask_schedule import FIXED_MASKS, MaskSchedule
from trainables.mode import TrainableModel
from tune_sparse.config import Protocol
from tune_sparse.models.architectures import PRUNED
from tune_sparse.modes import MODES
from tune_sparse.pruning.masks import Masks


def setup(
    mode: str,
    model: PreTrainedModel,
    protocol: Protocol,
    masks: Masks,
    seed: int,
    modules: Sequence[str] = PRUNED,
    schedule: MaskSchedule = FIXED_MASKS,
) -> TrainableModel:
    """Make a pruned model trainable, in place. modules: those that get adapters, where the mode has any; schedule: of
    masks that may change, where it has none."""
    if MODES[mode].has_adapter:
        return lora_finetuning.setup(mode, model, protocol, masks, seed, modules)
    return masked_finetuning.setup(mode, model, protocol, masks, schedule)


def restore_into(mode: str, model: PreTrainedModel, folder: Path, masks: Masks) -> None:
    """Write the weights that a finished run scored into the pruned model. folder: of the run."""
    if MODES[mode].has_adapter:
        lora_finetuning.restore_into(model, folder, masks)
    else:
        masked_finetuning.restore_into(model, folder)
