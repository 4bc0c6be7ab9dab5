"""What was deployed can be made again from its parts, and nothing else passes for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import finished, tiny_run
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from trainables.rebuild import deployed_by, merge_adapter_into
from trainables.torch_backend import Bench
from tune_sparse.data import load_splits
from tune_sparse.errors import InputError
from tune_sparse.evaluate import encode_test, score
from tune_sparse.masks import masked
from tune_sparse.models import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.outcomes import read_outcomes
from tune_sparse.pruning import make_masks
from tune_sparse.result import Ledger
from tune_sparse.tasks import TASKS

CPU = torch.device("cpu")


def pruned_model(checkpoint: Path) -> PreTrainedModel:
    model = load_model(checkpoint, torch.float32, CPU)
    weights = prunable_weights(model)
    masks = make_masks("unstructured", weights, check_checkpoint(str(checkpoint)).shape, 0.5, seed=0)
    write_weights_into(model, masked(weights, masks))
    return model


@pytest.mark.parametrize("mode", ["dense", "sparse-to-dense", "sparse-to-sparse"])
def test_a_rebuilt_run_answers_as_its_record_says(mode: str, llama: Path, tmp_path: Path) -> None:
    dense = {"method": "none", "sparsity": 0.0} if mode == "dense" else {}
    run, ledger = tiny_run(llama, mode=mode, **dense), Ledger(tmp_path)
    assert finished(run, ledger, Bench()).status == "done"
    recorded = read_outcomes(ledger.run_folder(run.run_id) / "examples.parquet")
    loaded = deployed_by(run, ledger, Bench())
    task = TASKS["boolq"]
    tests = encode_test(loaded.tokenizer, task, load_splits(task, None, run.protocol).test, run.protocol)
    assert list(score(loaded.model, loaded.tokenizer, [tests], run.protocol).outcomes) == recorded


@pytest.mark.parametrize("mode", ["sparse-to-dense", "sparse-to-sparse"])
def test_an_adapter_is_merged_into_the_pruned_checkpoint_as_its_mode_deploys_it(
    mode: str, llama: Path, tmp_path: Path
) -> None:
    run, ledger = tiny_run(llama, mode=mode), Ledger(tmp_path)
    finished(run, ledger, Bench())
    expected = prunable_weights(deployed_by(run, ledger, Bench()).model)
    model = pruned_model(llama)
    merge_adapter_into(model, ledger.run_folder(run.run_id) / "adapter")
    for name, weight in prunable_weights(model).items():
        assert torch.equal(weight, expected[name])


@pytest.mark.parametrize("mode", ["sparse-to-dense", "sparse-to-sparse"])
def test_an_adapter_of_another_mask_is_refused(mode: str, llama: Path, tmp_path: Path) -> None:
    run, ledger = tiny_run(llama, mode=mode), Ledger(tmp_path)
    finished(run, ledger, Bench())
    with pytest.raises(
        InputError, match=r"was trained under a mask .+ that this model does not have .+ Give the pruned"
    ):
        merge_adapter_into(load_model(llama, torch.float32, CPU), ledger.run_folder(run.run_id) / "adapter")


def test_an_adapter_of_stock_peft_is_merged_as_peft_does(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_model(llama, torch.float32, CPU), config)
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(tmp_path))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        model = load_model(llama, torch.float32, CPU)
        before = model(ids).logits
        merge_adapter_into(model, tmp_path)
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)
