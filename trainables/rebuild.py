"""The model of a finished run, made again from its base, its masks and what it saved."""

from __future__ import annotations

from trainables.finetuning import restore_into
from trainables.loaded import LoadedModel
from trainables.pruning_stage import Pruned
from trainables.worker import WorkerCache
from tune_sparse.errors import InputError
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.masks import Masks


def deployed_by(run: Run, ledger: LedgerReader, worker: WorkerCache) -> tuple[LoadedModel, Masks]:
    """Make the model that a finished run scored, and its masks. It is `worker`'s until that serves another run.

    Raises `InputError` for a base model that changed, or masks that do not come out as they were trained.
    """
    loaded, pruned = pruned_by(run, ledger, worker)
    restore_into(run.cell.mode, loaded.model, ledger.run_folder(run.run_id), pruned.masks)
    return loaded, pruned.masks


def pruned_by(run: Run, ledger: LedgerReader, worker: WorkerCache) -> tuple[LoadedModel, Pruned]:
    """Make the pruned model that a finished run trained on, and its pruning. Raises as `deployed_by`."""
    record = ledger.record(run.run_id)
    assert record is not None
    loaded = worker.model(run)
    pruned = worker.pruner.prune_into(run, loaded, worker.examples(run, loaded).train if run.is_calibrated else ())
    trained_with = record.metrics["mask_sha256"]
    if pruned.checksum != trained_with:
        raise InputError(
            f"the mask of {run.run_id} must come out as it was trained, {trained_with[:12]}, got "
            f"{pruned.checksum[:12]}. Rebuild it with the version of this program that ran it."
        )
    return loaded, pruned
