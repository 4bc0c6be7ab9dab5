"""What was deployed, made again from its parts: a finished run, or a checkpoint with an adapter."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from trainables.torch_backend import MODES, Bench, Loaded
from tune_sparse.errors import InputError
from tune_sparse.lora import MARKER, load_adapter
from tune_sparse.masks import Masks, mask_sha256
from tune_sparse.models import prunable_weights, write_weights_into
from tune_sparse.paths import read_json
from tune_sparse.result import Ledger, Run


def deployed_by(run: Run, ledger: Ledger, bench: Bench) -> Loaded:
    """The model that a finished run deployed, lent by `bench` until it lends again."""
    loaded = bench.lend(run)
    pruned = bench.pruner.prune(run, loaded, bench.rows(run, loaded).train if run.is_calibrated else ())
    write_weights_into(loaded.model, pruned.weights)
    merge_adapter_into(loaded.model, ledger.run_folder(run.run_id) / "adapter", pruned.masks)
    return loaded


def merge_adapter_into(model: PreTrainedModel, folder: Path, masks: Masks | None = None) -> None:
    """Merge an adapter as its mode deploys it; one of stock PEFT is merged as PEFT does.

    masks: of the pruned weights; where they are not given, what is not zero is kept.
    Raises `InputError` if the adapter was trained under another mask.
    """
    if not (folder / MARKER).is_file():
        PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        return
    marker, mode = read_json(folder / MARKER), MODES[read_json(folder / MARKER)["mode"]]
    if masks is None:
        masks = {name: weight != 0 for name, weight in prunable_weights(model).items()}
    if mode is not MODES["dense"] and mask_sha256(masks) != marker["mask_sha256"]:
        raise InputError(
            f"the adapter {folder} was trained under a mask ({marker['mask_sha256'][:12]}) that this model does not "
            f"have ({mask_sha256(masks)[:12]}). Give the pruned checkpoint, or name the run."
        )
    adapted = load_adapter(model, folder, mode.update_masks(masks))
    deployed = mode.deploy(adapted, masks)
    adapted.unload()
    write_weights_into(model, deployed.final or deployed.trained)
