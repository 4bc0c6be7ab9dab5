"""What was deployed can be made again from its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import finished, tiny_run

from trainables.rebuild import deployed_by
from trainables.worker import WorkerCache
from tune_sparse.data.splits import load_splits
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError
from tune_sparse.evaluation.outcomes import read_outcomes
from tune_sparse.evaluation.scoring import encode_test, score
from tune_sparse.files import read_json, write_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.lora.adapter_io import load_last_mask, merge_adapter_into
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.pruning.masks import masked
from tune_sparse.pruning.prune_model import make_masks

DENSE = {"method": "none", "sparsity": 0.0}


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("dense", DENSE),
        ("sparse-to-dense", {}),
        ("sparse-to-sparse", {}),
        ("sparse-to-sparse", {"method": "wanda"}),
        ("sparse-to-dense", {"method": "sparsegpt"}),
        ("masked-finetuning", {"learning_rate": 1e-3}),
    ],
)
def test_a_rebuilt_run_answers_as_its_record_says(
    mode: str, changes: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    run, ledger = tiny_run(llama, mode=mode, **changes), Ledger(tmp_path)
    assert finished(run, ledger, WorkerCache()).status == "done"
    recorded = read_outcomes(ledger.run_folder(run.run_id) / "examples.parquet")
    loaded, _ = deployed_by(run, ledger, WorkerCache())
    task = TASKS["boolq"]
    tests = encode_test(loaded.tokenizer, task, load_splits(task, None, run.protocol).test, run.protocol)
    assert list(score(loaded.model, loaded.tokenizer, [tests], run.protocol).outcomes) == recorded


def test_masks_that_come_out_otherwise_are_refused(llama: Path, tmp_path: Path) -> None:
    run, ledger = tiny_run(llama), Ledger(tmp_path)
    finished(run, ledger, WorkerCache())
    path = ledger.run_folder(run.run_id) / "result.json"
    record = read_json(path)
    write_json(path, record | {"metrics": record["metrics"] | {"mask_sha256": "0" * 64}})
    with pytest.raises(InputError, match=r"the mask of .+ must come out as it was trained, 000000000000, got"):
        deployed_by(run, ledger, WorkerCache())


@pytest.mark.parametrize("mode", ["sparse-to-dense", "sparse-to-sparse"])
def test_an_adapter_is_merged_into_the_pruned_checkpoint_as_its_mode_deploys_it(
    mode: str, llama: Path, tmp_path: Path
) -> None:
    run, ledger = tiny_run(llama, mode=mode), Ledger(tmp_path)
    finished(run, ledger, WorkerCache())
    expected = prunable_weights(deployed_by(run, ledger, WorkerCache())[0].model)
    model, adapter = load_model(llama, torch.float32, torch.device("cpu")), ledger.run_folder(run.run_id) / "adapter"
    weights = prunable_weights(model)
    masks = make_masks("unstructured", weights, check_checkpoint(str(llama)).dims, 0.5, seed=0)
    write_weights_into(model, masked(weights, masks))
    merge_adapter_into(model, adapter, load_last_mask(model, adapter))
    for name, weight in prunable_weights(model).items():
        assert torch.equal(weight, expected[name])
