"""What the tests share: a cache of their own, and checkpoints of the toy classes after two training steps."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune_sparse.cerebras.environment import SiteEnvironment

# As a trial computes. More threads than cores wait for each other, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

REAL_ROWS = Path(__file__).parent / "data"
"""A few real rows of each task; its README has their licences and sources."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Neither read nor write the user's cache."""
    before = os.environ.get("TUNE_SPARSE_CACHE")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TUNE_SPARSE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TUNE_SPARSE_CACHE"]
    else:
        os.environ["TUNE_SPARSE_CACHE"] = before


@pytest.fixture(scope="session")
def llama(own_cache: Path) -> Path:
    """A Llama checkpoint that has learned next to nothing."""
    from tune_sparse.models.toy_models import toy_model

    return toy_model("tiny-llama", steps=2)


@pytest.fixture(scope="session")
def mistral(own_cache: Path) -> Path:
    """A Mistral checkpoint with a sliding window that has learned next to nothing."""
    from tune_sparse.models.toy_models import toy_model

    return toy_model("tiny-mistral", steps=2)


@pytest.fixture(scope="session")
def architecture_folders(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{class: a sharded checkpoint of random weights}, with the tokenizer of the toy models."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 768}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gated = sizes | ids | {"num_key_value_heads": 4, "intermediate_size": 96, "initializer_range": 0.1}
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 128, "vocab_size": 768}
    opt = {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128, "init_std": 0.1}
    made = [
        (LlamaForCausalLM, LlamaConfig(**gated)),
        (MistralForCausalLM, MistralConfig(**gated, sliding_window=8)),
        (MixtralForCausalLM, MixtralConfig(**gated | {"intermediate_size": 48}, num_local_experts=4)),
        (GPT2LMHeadModel, GPT2Config(**gpt2, **ids, initializer_range=0.1)),
        (OPTForCausalLM, OPTConfig(**sizes, **ids, **opt)),
    ]
    folders: dict[str, Path] = {}
    for make, config in made:
        folder = tmp_path_factory.mktemp("architectures") / make.__name__
        torch.manual_seed(0)
        model = make(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero when made; a wrongly cut bias would go unseen
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder, max_shard_size="100KB")
        for path in llama.glob("tokenizer*"):
            shutil.copy(path, folder)
        folders[make.__name__] = folder
    return folders


@pytest.fixture
def real_rows() -> Path:
    """A data folder of real rows: 20 of each scored split and of each train split, and pieces of the texts."""
    return REAL_ROWS


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each of the two checkpoints; `model` and `tokenizer` are those of the same one."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    import torch

    from tune_sparse.models.checkpoints import load_model

    return load_model(folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from tune_sparse.models.checkpoints import load_tokenizer

    return load_tokenizer(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 60 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the site's Cerebras environment, which ends its trainings soon."""
    from stand_in_cerebras import write_environment

    from tune_sparse.cerebras import guard

    folder = write_environment(tmp_path / "site")
    monkeypatch.setenv("CEREBRAS_VENV", str(folder / "venv"))
    monkeypatch.setenv("MODELZOO", str(folder / "modelzoo"))
    monkeypatch.setenv(guard.STOP_VARIABLE, "0.5")
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of an MLflow that tracks nothing yet: to copy, since making one takes seconds."""
    from tune_sparse.tracking.sync import default_uri, make_client

    folder = tmp_path_factory.mktemp("mlflow")
    make_client(default_uri(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def environment() -> SiteEnvironment:
    """The Cerebras environment of this machine, with Model Zoo."""
    from tune_sparse.cerebras.environment import find_environment

    for name in ("CEREBRAS_VENV", "MODELZOO"):
        if not os.environ.get(name):
            pytest.skip(f"{name} is not set: see docs/cerebras.md")
    return find_environment()
