"""The contract of a model class that is trained: every mode, task kind, merge and rebuild, for each entry of the table.

A new entry of `ARCHITECTURES` comes under these tests by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trainables.rebuild import deployed_by
from trainables.worker import WorkerCache
from tune_sparse.errors import InputError
from tune_sparse.evaluation.validation import weights_sha256
from tune_sparse.export.merge import merge_run
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.architectures import ARCHITECTURES, TRAINED
from tune_sparse.models.checkpoints import check_checkpoint, prunable_weights
from tune_sparse.modes import MODES

SHORT = {"max_tokens": 96, "steps": 2, "n_train": 8, "n_test": 4, "eval_every": 2}
OWN = GPT2, OPT = ("GPT2LMHeadModel", "OPTForCausalLM")
"""Classes that no other test runs whole: of both together each mode, task kind and method kind is fast once."""
FAST = {
    (GPT2, "sparse-to-dense", "float32"),
    (OPT, "sparse-to-sparse", "bfloat16"),
    (GPT2, "masked-finetuning", "bfloat16"),
    (GPT2, "boolq"),
    (OPT, "gsm8k"),
    (OPT, "tinyshakespeare"),
    (GPT2, "structured", True),
    (OPT, "wanda", False),
    (GPT2, "sparsegpt", False),
}


def points(*axes: Iterable[Any], fast: Callable[..., bool]) -> list[Any]:
    """Every combination of some axes, those that are not `fast` marked as slow."""
    return [pytest.param(*point, marks=() if fast(*point) else pytest.mark.slow) for point in product(*axes)]


MODE_POINTS = points(
    TRAINED,
    MODES,
    ("float32", "bfloat16"),
    fast=lambda *point: point in FAST,
)
TASK_POINTS = points(TRAINED, ("boolq", "gsm8k", "tinyshakespeare"), fast=lambda *point: point in FAST)
METHOD_POINTS = points(
    TRAINED,
    ("structured", "wanda", "sparsegpt"),
    (False, True),
    fast=lambda *point: point in FAST,
)


@pytest.mark.parametrize(("name", "mode", "precision"), MODE_POINTS)
def test_each_mode_trains_merges_and_is_made_again(
    name: str, mode: str, precision: str, architecture_folders: dict[str, Path], tmp_path: Path
) -> None:
    sparsity = 0.5 if MODES[mode].is_pruned else 0.0
    cell = {"mode": mode, "sparsity": sparsity, "method": "unstructured" if sparsity else "none"}
    run = tiny_run(architecture_folders[name], precision=precision, **cell, **SHORT)
    ledger = Ledger(tmp_path)
    record = finished(run, ledger)
    assert (record.status, record.error) == ("done", None)
    assert record.metrics["actual_sparsity"] == sparsity
    assert record.metrics["train_step_flops"] > 0
    loaded, masks = deployed_by(run, ledger, WorkerCache())
    weights = prunable_weights(loaded.model)
    assert weights_sha256(weights) == record.metrics["weights_sha256"]
    assert not any(weight[~masks[name]].any() for name, weight in weights.items())
    report = merge_run(ledger, run.run_id, tmp_path / "merged")
    assert report["all_valid"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(prunable_weights(stock)[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(("name", "task"), TASK_POINTS)
def test_each_kind_of_task_is_trained_and_scored(
    name: str, task: str, architecture_folders: dict[str, Path], tmp_path: Path, real_examples: Path
) -> None:
    run = tiny_run(architecture_folders[name], real_examples, task=task, mode="masked-finetuning", **SHORT)
    record = finished(run, Ledger(tmp_path))
    assert (record.status, record.error) == ("done", None)


@pytest.mark.parametrize(("name", "method", "packing"), METHOD_POINTS)
def test_each_kind_of_method_is_trained(
    name: str, method: str, packing: bool, architecture_folders: dict[str, Path], tmp_path: Path
) -> None:
    run = tiny_run(architecture_folders[name], method=method, packing=packing, **SHORT)
    record = finished(run, Ledger(tmp_path))
    assert (record.status, record.error) == ("done", None)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - TRAINED))
def test_a_class_that_is_not_trained_is_refused_by_name(name: str, architecture_folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=rf"the class of a model must be .*says {name}"):
        check_checkpoint(str(architecture_folders[name]))


@pytest.mark.parametrize("name", points(TRAINED, fast=lambda name: name in OWN))
def test_a_dense_adapter_is_stock_peft(name: str, architecture_folders: dict[str, Path], tmp_path: Path) -> None:
    run = tiny_run(architecture_folders[name], mode="dense", sparsity=0.0, method="none", **SHORT)
    ledger = Ledger(tmp_path)
    assert finished(run, ledger).status == "done"
    ours, _ = deployed_by(run, ledger, WorkerCache())
    base = AutoModelForCausalLM.from_pretrained(architecture_folders[name])
    stock = PeftModel.from_pretrained(base, ledger.run_folder(run.run_id) / "adapter").merge_and_unload().eval()
    ids = torch.arange(2 * 20).view(2, 20)
    torch.testing.assert_close(stock(ids).logits, ours.model(ids).logits, rtol=1e-4, atol=1e-4)
