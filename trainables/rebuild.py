"""What a finished run deployed, made again from its base, its masks and what it trained."""

from __future__ import annotations

from safetensors.torch import load_file

from trainables.pipeline import Bench, Loaded
from tune_sparse.errors import InputError
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.run import Run
from tune_sparse.lora.adapter_io import merge_adapter_into
from tune_sparse.models.checkpoints import write_weights_into
from tune_sparse.pruning.masks import Masks


def deployed_by(run: Run, ledger: LedgerReader, bench: Bench) -> tuple[Loaded, Masks]:
    """The model that a finished run deployed, lent by `bench` until it lends again, and its masks.

    Raises `InputError` for a base model that changed, or masks that do not come out as they were trained.
    """
    loaded, masks = pruned_by(run, ledger, bench)
    folder = ledger.run_folder(run.run_id)
    if run.cell.mode == "masked-finetuning":
        write_weights_into(loaded.model, load_file(folder / "weights" / "weights.safetensors"))
    else:
        merge_adapter_into(loaded.model, folder / "adapter", masks)
    return loaded, masks


def pruned_by(run: Run, ledger: LedgerReader, bench: Bench) -> tuple[Loaded, Masks]:
    """The pruned model that a finished run trained on, and its masks. Raises as `deployed_by`."""
    record = ledger.record(run.run_id)
    assert record is not None
    loaded = bench.lend(run)
    pruned = bench.pruner.prune(run, loaded, bench.rows(run, loaded).train if run.is_calibrated else ())
    trained_with = record.metrics["mask_sha256"]
    if pruned.checksum != trained_with:
        raise InputError(
            f"the mask of {run.run_id} must come out as it was trained, {trained_with[:12]}, got "
            f"{pruned.checksum[:12]}. Rebuild it with the version of this program that ran it."
        )
    write_weights_into(loaded.model, pruned.weights)
    return loaded, pruned.masks
