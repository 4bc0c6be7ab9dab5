"""A level of a chain begins where the level before it ended: with the weights that it scored, and their masks."""

from __future__ import annotations

from dataclasses import replace

from trainables import finetuning
from trainables.also_trained import scored_weights
from trainables.loaded import LoadedModel
from trainables.masked_finetuning import SAVED
from tune_sparse.errors import InputError, NotReadyError, RunError
from tune_sparse.evaluation.validation import weights_sha256
from tune_sparse.ledger.contracts import RunStore
from tune_sparse.ledger.record import read_record
from tune_sparse.ledger.run import Run
from tune_sparse.models.safetensors_io import TensorFiles
from tune_sparse.pruning.bit_masks import BitMasks


def restore_level_into(before: Run, masks: BitMasks, loaded: LoadedModel, store: RunStore) -> LoadedModel:
    """Write the weights that a level scored into the model; returns the model with them in place of its dense weights.

    masks: of that level. Raises `NotReadyError` for a level that is not done, `RunError` where its files are gone, or
    are not what it scored.
    """
    folder = store.finished(before.run_id)
    record = read_record(folder)
    assert record is not None
    try:
        finetuning.restore_into(before.cell.mode, loaded.model, folder, masks)
        level = replace(loaded, dense_weights=replace(loaded.dense_weights, tensors=TensorFiles([folder / SAVED])))
    except NotReadyError:
        raise
    except (InputError, OSError) as error:
        raise _gone(before, str(error)) from error
    recorded = record.metrics["mask_sha256"], record.metrics["weights_sha256"]
    found = masks.sha256, weights_sha256(scored_weights(loaded.model, before.protocol))
    if found != recorded:
        raise _gone(before, "its masks or weights are others than it scored")
    return level


def _gone(before: Run, why: str) -> RunError:
    return RunError(
        f"a level begins from the weights of the level before it, {before.run_id}, which are not there: {why}. Discard "
        "that run and start the sweep again."
    )


def check_only_loses(before: BitMasks, masks: BitMasks) -> None:
    """Raise `RunError` for masks that keep a weight which was pruned before."""
    for name in masks:
        if back := int((masks[name] & ~before[name]).sum()):
            raise RunError(f"what a level prunes must stay pruned, {name} has {back} weights back")
