"""The model of a finished run, made again from its base, its masks and what it saved."""

from __future__ import annotations

from transformers import PreTrainedModel

from trainables.also_trained import scored_weights
from trainables.finetuning import restore_into
from trainables.loaded import LoadedModel
from trainables.pruning_stage import ENDED_MASKS, Pruned, read_into
from trainables.worker import WorkerCache
from tune_sparse.errors import InputError
from tune_sparse.evaluation.validation import weights_sha256
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.prunings import StoredPruning
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.mask_io import read_bits
from tune_sparse.pruning.masks import Masks


def deployed_by(run: Run, ledger: LedgerReader, worker: WorkerCache) -> tuple[LoadedModel, Masks]:
    """Make the model that a finished run scored, and its masks. It is `worker`'s until that serves another run.

    Raises `InputError` for a base model that changed, a stored pruning that is gone or not whole, and for masks or
    merged weights that do not come out as they were recorded.
    """
    folder = ledger.run_folder(run.run_id)
    if run.updates:
        loaded = worker.model(run)
        masks = read_bits(folder / ENDED_MASKS, loaded.model.device)
        _check_masks(run, ledger, masks.sha256)
    else:
        loaded, pruned = pruned_by(run, ledger, worker)
        masks = pruned.masks
    restore_into(run.cell.mode, loaded.model, folder, masks)
    check_merged(run, ledger, loaded.model)
    return loaded, masks


def pruned_by(run: Run, ledger: LedgerReader, worker: WorkerCache) -> tuple[LoadedModel, Pruned]:
    """Make the pruned model on whose fixed masks a finished run trained, and its pruning. Raises as `deployed_by`."""
    stored, loaded = stored_pruning(run, ledger), worker.model(run)
    if stored is None:
        pruned = Pruned.from_masks(worker.pruner.make_into(run, loaded, ()), loaded)
    else:
        pruned = read_into(stored, loaded)
    _check_masks(run, ledger, pruned.checksum)
    return loaded, pruned


def _check_masks(run: Run, ledger: LedgerReader, found: str) -> None:
    record = ledger.record(run.run_id)
    assert record is not None
    trained_with = record.metrics["mask_sha256"]
    if found != trained_with:
        raise InputError(
            f"the mask of {run.run_id} must come out as it was trained, {trained_with[:12]}, got {found[:12]}. Rebuild "
            "it with the version of this program that ran it, and the prunings of its results folder."
        )


def stored_pruning(run: Run, ledger: LedgerReader) -> StoredPruning | None:
    """Return the stored pruning that a finished run was trained on; None for a method that stores none.

    Raises `InputError` where it is gone: one that is made again may differ in bits.
    """
    stored = ledger.pruning(run)
    if stored is None and run.pruning_id is not None:
        folder = ledger.run_folder(run.run_id).parents[1] / "prunings" / run.pruning_id
        raise InputError(
            f"{run.run_id} was trained on a stored pruning, {folder} is missing. Copy it there, give the --results-dir "
            "that has it, or discard the run and start its sweep again."
        )
    return stored


def check_merged(run: Run, ledger: LedgerReader, model: PreTrainedModel) -> None:
    """Raise `InputError` unless the weights of a merged model are those that a finished run scored."""
    record = ledger.record(run.run_id)
    assert record is not None
    recorded, found = record.metrics["weights_sha256"], weights_sha256(scored_weights(model, run.protocol))
    if found != recorded:
        hardware = record.environment.get("hardware", "unknown")
        raise InputError(
            f"the merged weights of {run.run_id} must be those that it scored, {recorded[:12]}, got {found[:12]}. "
            f"Merge on the hardware and with the versions of its record ({hardware}), or run it again here."
        )
