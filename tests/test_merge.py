"""Merged checkpoints of every mode: plain transformers loads them, with the zeros and the function that were scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from peft import LoraConfig, PeftModel, get_peft_model
from plain_masks import make_masks, masked
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trainables import pruning_stage
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, FAULT, OK
from tune_sparse.config import Protocol
from tune_sparse.data.splits import encode_answers, load_splits
from tune_sparse.data.tasks import TASKS
from tune_sparse.export import merge
from tune_sparse.export.merge import merge_adapter, merge_run
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.lora.adapter_io import merge_adapter_into, save_adapter
from tune_sparse.lora.layer import adapt_model, sparse_lora_layers
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.modes import MODES
from tune_sparse.pruning.prune_into import prune_into
from tune_sparse.training.loop import mean_loss

IDS = torch.arange(2 * 20).view(2, 20)


def stock(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_merged_run_is_the_model_that_was_scored(mode: str, precision: str, llama: Path, tmp_path: Path) -> None:
    sparse = {"method": "unstructured", "sparsity": 0.5} if mode != "dense" else {"method": "none", "sparsity": 0.0}
    run = tiny_run(llama, mode=mode, precision=precision, **sparse)
    ledger = Ledger(tmp_path / "results")
    record = finished(run, ledger)
    assert record.error is None
    report = merge_run(ledger, run.run_id, tmp_path / "merged")
    assert report["all_valid"]
    assert report["mask_sha256"] == record.metrics["mask_sha256"]
    assert report["actual_sparsity"] == record.metrics["actual_sparsity"]
    model = stock(tmp_path / "merged")
    assert model.dtype == getattr(torch, precision)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    pairs = [
        TASKS["boolq"].training_pair(example) for example in load_splits(TASKS["boolq"], None, run.protocol).selection
    ]
    examples = encode_answers(tokenizer, pairs, run.protocol.max_tokens)
    assert mean_loss(model, examples, run.protocol) == record.metrics["eval_loss"]
    origin = json.loads((tmp_path / "merged" / "tune_sparse_merge.json").read_text())
    assert (origin["mode"], origin["run_id"]) == (mode, run.run_id)
    assert not list(tmp_path.glob(".*.partial"))


@pytest.fixture
def pruned(llama: Path, tmp_path: Path) -> Path:
    """A pruned checkpoint."""
    model = load_model(llama, torch.float32, torch.device("cpu"))
    weights = prunable_weights(model)
    masks = make_masks("unstructured", weights, check_checkpoint(str(llama)).dims, 0.5, seed=0)
    write_weights_into(model, masked(weights, masks))
    folder = Path(shutil.copytree(llama, tmp_path / "pruned"))
    model.save_pretrained(folder)
    return folder


Adapter = Callable[[str], PeftModel]


@pytest.fixture
def adapter(pruned: Path, tmp_path: Path) -> Adapter:
    """Saves an adapter of a mode in tmp_path/adapter, and returns the adapted model."""

    def make(mode: str) -> PeftModel:
        model = load_model(pruned, torch.float32, torch.device("cpu"))
        masks = {name: weight != 0 for name, weight in prunable_weights(model).items()}
        confined = masks if mode == "sparse-to-sparse" else None
        adapted = adapt_model(model, Protocol(lora_rank=4, lora_alpha=8.0), confined, seed=0)
        for seed, (_, layer) in enumerate(sparse_lora_layers(adapted)):
            layer.factors()[1].data.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
        save_adapter(adapted, tmp_path / "adapter", mode, masks)
        return adapted.eval()

    return make


@pytest.mark.parametrize("mode", ["dense", "sparse-to-dense", "sparse-to-sparse"])
def test_an_adapter_is_merged_as_its_marker_says(mode: str, adapter: Adapter, pruned: Path, tmp_path: Path) -> None:
    adapted = adapter(mode)
    merge_adapter(str(pruned), tmp_path / "adapter", tmp_path / "merged")
    zeros = {name: weight == 0 for name, weight in prunable_weights(stock(pruned)).items()}
    found = prunable_weights(stock(tmp_path / "merged"))
    for name, layer in sparse_lora_layers(adapted):
        weight, kept = layer.merged_weight(), ~zeros[name]
        assert torch.equal(found[name][kept], weight[kept])
        if mode == "dense":
            assert torch.equal(found[name], weight)
        else:
            assert not found[name][zeros[name]].any()
    if mode == "sparse-to-sparse":
        assert torch.equal(logits(stock(tmp_path / "merged")), logits(adapted))


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_an_adapter_of_stock_peft_keeps_zeros_if_asked(keep_zeros: bool, pruned: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(stock(pruned), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merge_adapter(str(pruned), tmp_path / "adapter", tmp_path / "merged", keep_zeros)
    expected, found = prunable_weights(adapted.merge_and_unload()), prunable_weights(stock(tmp_path / "merged"))
    for name, weight in prunable_weights(stock(pruned)).items():
        wanted = expected[name] * (weight != 0) if keep_zeros else expected[name]
        torch.testing.assert_close(found[name], wanted)


def command(*arguments: Any) -> int:
    return main(["merge", *map(str, arguments)])


def test_the_command_merges_an_adapter(
    adapter: Adapter, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter("sparse-to-sparse")
    places = ["--base", pruned, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    assert command(*places) == OK
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}: sparsity 0.5000, every masked weight is 0\n"
    assert command(*places) == BAD_INPUT
    assert "a merged model needs a folder of its own" in capsys.readouterr().err
    assert command(*places[:-1], tmp_path / "again", "--json") == OK
    assert json.loads(capsys.readouterr().out)["all_valid"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x"], "merge takes --run, or --base with --adapter"),
        (["--base", "m", "--output", "x"], "merge takes --run, or --base with --adapter"),
        (["--run", "r", "--base", "m", "--adapter", "a", "--output", "x"], "merge takes --run, or --base with"),
        (["--run", "r", "--output", "/no/such/folder/x"], "the folder of --output must exist, /no/such/folder does"),
        (["--run", "absent", "--output", "x"], "unknown run 'absent'"),
    ],
)
def test_a_wrong_choice_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_done_is_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, ledger = tiny_run(llama), Ledger(tmp_path / "results")
    ledger.write_record(run, Record(run.run_id, run.identity, "interrupted"))
    places = ["--results-dir", ledger.folder, "--output", tmp_path / "merged"]
    assert command("--run", run.run_id, *places) == BAD_INPUT
    assert "only a run that is done can be merged" in capsys.readouterr().err


def test_a_mask_that_does_not_come_out_again_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ledger = tiny_run(llama), Ledger(tmp_path / "results")
    finished(run, ledger)
    monkeypatch.setattr(pruning_stage, "prune_into", lambda model, method, *rest: prune_into(model, "random", *rest))
    with pytest.raises(merge.InputError, match="must come out as it was trained"):
        merge_run(ledger, run.run_id, tmp_path / "merged")


def test_a_merge_that_fails_its_check_leaves_nothing(
    adapter: Adapter, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter("sparse-to-dense")
    monkeypatch.setattr(merge, "merge_adapter_into", lambda model, folder, _: merge_adapter_into(model, folder, None))
    places = ["--base", pruned, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    assert command(*places) == FAULT
    assert "masked weights must be 0, got " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "adapter"}
