"""Checkpoints of random weights: drawn once, the same everywhere, and then like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from factories import finished, tiny_run
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tune_sparse.config import SweepConfig
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.checkpoints import check_checkpoint, find_folder, load_model, prepare_models, short_name
from tune_sparse.models.from_scratch import FROM_SCRATCH, byte_gpt2, byte_tokenizer, draw_from_scratch
from tune_sparse.sweep.plan import make_plan

NAME = "shakespeare-gpt2"
TOKENIZER = byte_tokenizer(64)


@pytest.fixture(scope="module")
def drawn() -> Path:
    return prepare_models([NAME], print)[NAME]


@given(st.text())
def test_a_token_is_a_byte(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_a_model_is_drawn_once_and_is_a_checkpoint_like_any_other(drawn: Path) -> None:
    lines: list[str] = []
    assert draw_from_scratch(NAME, lines.append) == find_folder(NAME) == drawn
    assert lines == []
    checkpoint = check_checkpoint(NAME)
    assert (checkpoint.name, checkpoint.dims.max_positions, checkpoint.dims.vocab_size) == (NAME, 64, 257)
    assert AutoTokenizer.from_pretrained(drawn)("é")["input_ids"] == TOKENIZER("é")["input_ids"]
    weights = load_model(drawn, torch.float32, torch.device("cpu"))
    assert weights.get_parameter("transformer.wte.weight").std().item() == pytest.approx(0.02, rel=0.05)
    assert not weights.get_parameter("transformer.h.0.attn.c_attn.bias").any()


def test_the_same_weights_are_drawn_again(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path))
    with pytest.raises(NotReadyError, match=f"tune-sparse prepare --models {NAME}"):
        find_folder(NAME)
    torch.rand(3)
    again = draw_from_scratch(NAME, print)
    assert (again / "model.safetensors").read_bytes() == (drawn / "model.safetensors").read_bytes()


def test_a_folder_gives_its_config_and_tokenizer(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    reference = f"random:{folder}"
    assert short_name(reference) == "mine-random"
    prepare_models([reference], print)
    config = SweepConfig.from_names(
        {"models": [reference], "tasks": ["boolq"], "data_dir": "synthetic", "sparsities": [0.5], "methods": ["random"]}
        | {"results_dir": tmp_path / "results"}
    )
    runs = list(make_plan(config).runs.values())
    assert {run.model_path for run in runs} == {f"random:{folder.resolve()}"}
    assert {run.model_fingerprint for run in runs} == {check_checkpoint(reference).fingerprint}
    pretrained = AutoModelForCausalLM.from_pretrained(llama)
    drawn = AutoModelForCausalLM.from_pretrained(find_folder(reference))
    assert not torch.equal(drawn.model.embed_tokens.weight, pretrained.model.embed_tokens.weight)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config"):
        find_folder(f"random:{tmp_path}")


def test_the_large_one_is_gpt2() -> None:
    config = byte_gpt2(**FROM_SCRATCH["shakespeare-gpt2-124m"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    body = sum(parameter.numel() for parameter in model.parameters()) - 257 * 768
    assert body == 124_439_808 - 50257 * 768


def test_it_learns_a_text_and_says_its_bits_per_byte(drawn: Path, tmp_path: Path, real_examples: Path) -> None:
    """Untrained it guesses one byte of 257."""
    settings = {"max_tokens": 32, "steps": 8, "n_train": 64, "n_test": 16, "train_also": ("bias", "norm", "embeddings")}
    cell = {"task": "tinyshakespeare", "mode": "masked-finetuning", "sparsity": 0.0, "method": "none"}
    metrics = finished(tiny_run(drawn, real_examples, **cell, **settings), Ledger(tmp_path)).metrics
    assert metrics["perplexity_before_tuning"] == pytest.approx(257, rel=0.2)
    assert metrics["perplexity"] < 0.5 * metrics["perplexity_before_tuning"]
    assert 2 ** metrics["bits_per_byte"] == pytest.approx(metrics["perplexity"])
