"""What the tests share: a cache of their own, and checkpoints of the toy classes after two training steps.

What takes seconds to make is made once for the whole run, by whichever worker of pytest-xdist needs it first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune_sparse.cerebras.environment import SiteEnvironment

# As a trial computes. More threads than cores wait for each other, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

REAL_EXAMPLES = Path(__file__).parent / "data"
"""A few real examples of each task; its README has their licences and sources."""


Once = Callable[[str, Callable[[Path], None]], Path]
"""`once(name, make)`: a folder that `make` has filled, made by the first worker that asks and then only read."""


MACHINE = pytest.mark.xdist_group("machine")
"""Tests that start clusters, servers or browsers: one at a time, and first, beside the files that compute."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file go to one worker, which then makes its models and imports once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") != MACHINE.mark)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run of pytest see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(run_folder: Path) -> Once:
    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = run_folder / "once" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial = folder.with_name(f"{name}.partial")
                partial.mkdir()
                make(partial)
                partial.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session", autouse=True)
def own_cache(run_folder: Path) -> Iterator[Path]:
    """Neither read nor write the user's cache."""
    folder = run_folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNE_SPARSE_CACHE", str(folder))
        yield folder


def _checkpoint(cache: Path, name: str) -> Path:
    from tune_sparse.models.toy_models import toy_model

    cache.mkdir(exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        return toy_model(name, steps=2)


@pytest.fixture(scope="session")
def llama(own_cache: Path) -> Path:
    """A Llama checkpoint that has learned next to nothing."""
    return _checkpoint(own_cache, "tiny-llama")


@pytest.fixture(scope="session")
def mistral(own_cache: Path) -> Path:
    """A Mistral checkpoint with a sliding window that has learned next to nothing."""
    return _checkpoint(own_cache, "tiny-mistral")


@pytest.fixture(scope="session")
def architecture_folders(llama: Path, once: Once) -> dict[str, Path]:
    """{class: a sharded checkpoint of random weights}, with the tokenizer of the toy models."""
    made = once("architectures", lambda folder: _write_architectures(folder, llama))
    return {folder.name: folder for folder in sorted(made.iterdir())}


def _write_architectures(place: Path, llama: Path) -> None:
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
    for make, config in made:
        torch.manual_seed(0)
        model = make(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero when made; a wrongly cut bias would go unseen
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(place / make.__name__, max_shard_size="100KB")
        for path in llama.glob("tokenizer*"):
            shutil.copy(path, place / make.__name__)


@pytest.fixture(scope="session")
def wide_llama(llama: Path, once: Once) -> Path:
    """A bfloat16 Llama of 205 million random weights, 1,024 wide with 16 layers: on it bytes are counted."""
    from factories import write_llama

    return once("wide-llama", lambda folder: write_llama(folder, llama, 1024, 16, 2816, 16))


@pytest.fixture
def real_examples() -> Path:
    """A data folder of real examples: 20 of each scored split and of each train split, and pieces of the texts."""
    return REAL_EXAMPLES


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
def site(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the site's Cerebras environment, which ends its trainings soon."""
    from stand_in_cerebras import write_environment

    from tune_sparse.cerebras import guard

    folder = write_environment(tmp_path / "site", run_folder / "losses")
    monkeypatch.setenv("CEREBRAS_VENV", str(folder / "venv"))
    monkeypatch.setenv("MODELZOO", str(folder / "modelzoo"))
    monkeypatch.setenv(guard.STOP_VARIABLE, "0.5")
    return folder


@pytest.fixture(scope="session")
def empty_store(once: Once) -> Path:
    """The database of an MLflow that tracks nothing yet: to copy, since making one takes seconds."""
    from tune_sparse.tracking.sync import default_uri, make_client

    def make(folder: Path) -> None:
        make_client(default_uri(folder)).search_experiments()

    return once("mlflow", make) / "mlflow.db"


@pytest.fixture
def results(tmp_path: Path, empty_store: Path) -> Path:
    """A results folder in which MLflow's database is made already, which takes a sweep seconds."""
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(empty_store, folder)
    return folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray cluster of this process: two cores, a token of each kind of hardware."""
    import ray

    from tune_sparse.config import CS3, CS3_TRIAL

    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init(address="local", num_cpus=2, num_gpus=1, resources={CS3: 1, CS3_TRIAL: 1}, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def environment() -> SiteEnvironment:
    """The Cerebras environment of this machine, with Model Zoo."""
    from tune_sparse.cerebras.environment import find_environment

    for name in ("CEREBRAS_VENV", "MODELZOO"):
        if not os.environ.get(name):
            pytest.skip(f"{name} is not set: see docs/cerebras.md")
    return find_environment()


@pytest.fixture(scope="session")
def device_process() -> Iterator[ProcessPoolExecutor]:
    """A process that knows the simulated device, which it must before it computes anything."""
    from simulated_device import register

    with ProcessPoolExecutor(1, get_context("spawn"), initializer=register) as process:
        yield process
