"""Weights of a checkpoint: streamed into a model, and read again when they are wanted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from factories import tiny_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainables.worker import WorkerCache
from tune_sparse.errors import NotReadyError
from tune_sparse.models.checkpoints import load_model, prunable_weights, without_dropout

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"]
)
def test_a_model_is_the_one_that_stock_transformers_loads(
    name: str, dtype: torch.dtype, architecture_folders: dict[str, Path]
) -> None:
    folder = architecture_folders[name]
    found = load_model(folder, dtype, CPU)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    for kind in ("named_parameters", "named_buffers"):
        own, stock = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (found, expected))
        assert own.keys() == stock.keys()
        for tensor, tensor_of_stock in zip(own.values(), stock.values(), strict=True):
            assert tensor.dtype == tensor_of_stock.dtype
            assert torch.equal(tensor, tensor_of_stock)
    heads = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (found, expected)]
    assert heads[0] == heads[1]
    assert found.config.to_dict() == without_dropout(expected.config).to_dict()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected.eval()(ids).logits)


def test_a_tied_head_is_tied(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama, torch.float32, CPU)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    tied = load_model(tmp_path, torch.float32, CPU)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_dense_weights_are_read_one_at_a_time_in_the_precision_of_the_run(precision: str, folder: Path) -> None:
    loaded = WorkerCache().model(tiny_run(folder, precision=precision))
    own = prunable_weights(loaded.model)
    assert list(loaded.dense_weights) == list(own)
    for name, weight in loaded.dense_weights.items():
        assert weight.dtype == own[name].dtype
        assert torch.equal(weight, own[name])
        weight.zero_()  # it is the caller's
    assert all(torch.equal(loaded.dense_weights[name], weight) for name, weight in own.items())


def test_a_worker_reads_the_dense_weights_again_over_what_a_run_left(folder: Path) -> None:
    worker, run = WorkerCache(), tiny_run(folder)
    model = worker.model(run).model
    before = {name: weight.clone() for name, weight in prunable_weights(model).items()}
    for weight in prunable_weights(model).values():
        weight.zero_()
    assert worker.model(run).model is model
    assert worker.loads == 1
    assert all(torch.equal(weight, before[name]) for name, weight in prunable_weights(model).items())


def test_a_checkpoint_that_changed_while_it_was_used_is_named(folder: Path) -> None:
    worker, run, path = WorkerCache(), tiny_run(folder), folder / "model.safetensors"
    loaded = worker.model(run)
    weights = load_file(path)
    save_file(weights, folder / "new.safetensors")
    (folder / "new.safetensors").rename(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    message = f"a checkpoint must stay as it is while it is used, {path} changed since it was opened"
    with pytest.raises(NotReadyError, match=message):
        loaded.dense_weights[next(iter(loaded.dense_weights))]
    with pytest.raises(NotReadyError, match=message):
        worker.model(run)
    path.unlink()
    with pytest.raises(NotReadyError, match=message):
        worker.model(run)
