"""The set-up of a process that trains, scores or merges: before CUDA starts."""

from __future__ import annotations

import os

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What a user may have set; torch reads it when it first allocates on a GPU."""


def prepare_process(deterministic: bool = False) -> None:
    """Choose how torch allocates and adds up on a GPU.

    Segments grow in place, so that micro-batches of many lengths leave no holes. Products of bfloat16 matrices add up
    in float32 whatever the shape. deterministic: only algorithms that repeat to the last bit; an operation that has
    none raises.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(deterministic)
