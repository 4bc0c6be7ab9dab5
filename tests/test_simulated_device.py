"""Whole cells on a device that is not the CPU: they run, they compute what the CPU computes, and the host rarely waits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from simulated_device import DEVICE, Activity, register, simulated_device
from torch.nn.attention import SDPBackend, sdpa_kernel

from tune_sparse.config import TORCH_MODES
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.modes import MODES

pytestmark = pytest.mark.xdist_group("simulated device")
STEPS, NEW_TOKENS = 4, 32
CELLS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense", "method": "none", "sparsity": 0.0, "task": "hellaswag"},
    "unstructured": {"mode": "sparse-to-sparse", "method": "unstructured", "precision": "bfloat16"},
    "structured": {"mode": "sparse-to-sparse", "method": "structured", "task": "hellaswag"},
    "wanda": {"mode": "masked-finetuning", "method": "wanda", "precision": "bfloat16"},
    "owl": {"mode": "sparse-to-dense", "method": "wanda-owl", "task": "hellaswag", "activation_checkpointing": True},
    "sparsegpt": {"mode": "sparse-to-dense", "method": "sparsegpt", "task": "gsm8k", "precision": "bfloat16"},
    "gradient": {"mode": "sparse-to-sparse", "method": "gradient", "packing": True},
    "random": {"mode": "masked-finetuning", "method": "random", "task": "wikitext2"},
}
