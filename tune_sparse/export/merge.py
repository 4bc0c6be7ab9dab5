"""Base, mask and adapter as one Hugging Face checkpoint: the zeros kept, checked before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainables.rebuild import deployed_by
from trainables.worker import WorkerCache
from tune_sparse.config import SYNTHETIC
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import InputError, RunError, unknown_name
from tune_sparse.evaluation.outcomes import Outcome, read_outcomes
from tune_sparse.evaluation.scored_as import MERGED_FILE, ScoredAs, scoring_settings
from tune_sparse.evaluation.validation import validation_report
from tune_sparse.export.model_card import model_card
from tune_sparse.files import atomic_folder, write_json, write_text
from tune_sparse.identity import hash_json
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.lora.adapter_io import load_last_mask, merge_adapter_into, read_marker
from tune_sparse.models.checkpoints import (
    TOKENIZER_SETTINGS,
    TOKENIZERS,
    check_checkpoint,
    load_model,
    prunable_weights,
)
from tune_sparse.modes import DENSE
from tune_sparse.pruning.masks import Masks, count_sparsity, mask_sha256, nonzero_masks

COPIED = (*TOKENIZERS, *TOKENIZER_SETTINGS, "generation_config.json", "chat_template.jinja")
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Merged:
    """A model with its final weights, and what is known of it."""

    model: PreTrainedModel
    masks: Masks
    base: Path
    origin: dict[str, Any]
    """mode, where base and adapter came from, and for a run how it was scored"""
    run: Run | None = None
    record: Record | None = None


def merge_run(ledger: LedgerReader, run_id: str, output: Path) -> dict[str, Any]:
    """Write the model that a finished run deployed and scored; returns the validation report.

    It is made again from the base model, the run's mask and what the run trained. Raises `InputError` for a run that
    is not done, and as `deployed_by`.
    """
    _check_absent(output)
    if run_id not in ledger.run_ids():
        raise unknown_name("run", run_id, ledger.run_ids())
    record = ledger.record(run_id)
    if record is None or record.status != "done":
        status = record.status if record else "missing"
        raise InputError(f"only a run that is done can be merged, {run_id} is {status}. Run its sweep again.")
    run = ledger.run(run_id)
    loaded, masks = deployed_by(run, ledger, WorkerCache())
    scored_as = _scored_as(run, read_outcomes(ledger.run_folder(run_id) / "examples.parquet"))
    origin = {"mode": run.cell.mode, "run_id": run_id, "base": run.model_path, "scored_as": asdict(scored_as)}
    return _write(Merged(loaded.model, masks, check_checkpoint(run.model_path).path, origin, run, record), output)


def _scored_as(run: Run, outcomes: Sequence[Outcome]) -> ScoredAs:
    """How a finished run was scored. outcomes: its test examples."""
    ids: dict[str, list[str]] = {}
    for outcome in outcomes:
        ids.setdefault(outcome.task, []).append(outcome.id)
    return ScoredAs(
        f"run {run.run_id}",
        scoring_settings(run.protocol),
        run.data_dir or str(SYNTHETIC),
        tuple(task.name for task in tasks_named(run.cell.task)),
        {task: hash_json(own) for task, own in ids.items()},
    )


def merge_adapter(base: str, adapter: Path, output: Path, keep_zeros: bool = False) -> dict[str, Any]:
    """Write a base model with an adapter merged; returns the validation report.

    An adapter of this project says its mode and mask, and the base must be the pruned model that it was trained on.
    One of stock PEFT is merged as plain LoRA; with `keep_zeros` weights that are 0 in the base stay 0.
    """
    _check_absent(output)
    marker, checkpoint = read_marker(adapter), check_checkpoint(base)
    precision = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True).dtype or torch.float32
    model = load_model(checkpoint.path, precision, torch.device("cpu"))
    last_mask = load_last_mask(model, adapter)
    if marker is None and keep_zeros:
        last_mask = nonzero_masks(prunable_weights(model))
    merge_adapter_into(model, adapter, last_mask)
    masks = last_mask or nonzero_masks(prunable_weights(model))
    origin = {"mode": marker.mode if marker else DENSE, "adapter": str(adapter.resolve()), "base": base}
    return _write(Merged(model, masks, checkpoint.path, origin), output)


def _check_absent(output: Path) -> None:
    if output.exists():
        raise InputError(f"a merged model needs a folder of its own, {output} exists. Give another --output.")
    if not output.parent.is_dir():
        raise InputError(f"the folder of --output must exist, {output.parent} does not. Make it.")


def _write(merged: Merged, output: Path) -> dict[str, Any]:
    """Write, load with stock transformers, check, and only then give the folder its name."""
    with atomic_folder(output) as partial:
        merged.model.save_pretrained(partial)
        for name in COPIED:
            if (merged.base / name).is_file():
                shutil.copyfile(merged.base / name, partial / name)
        expected = _probe(merged.model)
        merged.model.to("meta")  # its memory is for the model that is loaded next
        report = _checked(expected, merged.masks, partial)
        write_json(partial / "validation_report.json", report)
        known = {"mask_sha256": report["mask_sha256"], "actual_sparsity": report["actual_sparsity"]}
        write_json(partial / MERGED_FILE, merged.origin | known)
        write_text(partial / "README.md", model_card(merged.origin, report, merged.run, merged.record))
    return report


def _checked(expected: Tensor, masks: Masks, folder: Path) -> dict[str, Any]:
    """The validation report of a checkpoint as stock transformers loads it. Raises `RunError` for any fault.

    expected: the logits that `_probe` must find, in the precision and on the device of the model that was written.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval().to(expected.device)
    violations = [] if loaded.dtype == expected.dtype else [f"the precision must be kept, got {loaded.dtype}"]
    if not violations and not torch.equal(_probe(loaded), expected):
        violations.append("stock transformers must compute the merged function to the last bit")
    target, checksum = count_sparsity(masks), mask_sha256(masks)
    report = validation_report(prunable_weights(loaded), masks, target, checksum, violations)
    if not report["all_valid"]:
        raise RunError("a merged model must pass its validation: " + "; ".join(report["violations"]))
    return report


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Tensor:
    """Logits of a few tokens spread over the vocabulary: (tokens, vocabulary)."""
    ids = torch.linspace(0, model.config.vocab_size - 1, PROBE_TOKENS, device=model.device).long()
    return model(input_ids=ids[None], use_cache=False).logits[0]
