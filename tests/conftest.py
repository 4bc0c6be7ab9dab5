"""What the tests share: a cache of their own, and checkpoints of the embedded classes after two training steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# As a trial computes. More threads than cores wait for each other, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
"""Real rows, present only where the project is developed."""


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
    from tune_sparse.embedded_models import embedded_model

    return embedded_model("tiny-llama", steps=2)


@pytest.fixture(scope="session")
def mistral(own_cache: Path) -> Path:
    """A Mistral checkpoint with a sliding window that has learned next to nothing."""
    from tune_sparse.embedded_models import embedded_model

    return embedded_model("tiny-mistral", steps=2)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real rows; tests on them are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real rows at {SHARED_DATA}")
    return SHARED_DATA
