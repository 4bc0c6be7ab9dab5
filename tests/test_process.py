"""What a worker sets before CUDA starts, and what of its hardware is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainables.hardware import driver_version, environment

SHOW = """
import json, os, sys
from trainables.process import prepare_process
assert "torch" not in sys.modules
prepare_process(deterministic=sys.argv[1] == "yes")
import torch
print(json.dumps([
    os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.are_deterministic_algorithms_enabled(),
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction]))
"""


@pytest.mark.parametrize(
    ("deterministic", "own", "expected"),
    [
        ("no", {}, ["expandable_segments:True", None, None, False, False]),
        ("yes", {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, [None, "x:1", ":4096:8", True, False]),
    ],
)
def test_a_process_is_prepared_before_torch_is_imported(
    deterministic: str, own: dict[str, str], expected: list[object]
) -> None:
    unset = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"}
    place = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", SHOW, deterministic]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=place | own)
    assert json.loads(ended.stdout) == expected


def test_what_can_change_the_last_bits_is_recorded() -> None:
    here = environment()
    assert here["packages"]["accelerate"]
    assert "math" in here["attention"].split()
    assert here["card"] is None
    assert here["deterministic"] is torch.are_deterministic_algorithms_enabled() is False


def test_the_driver_is_asked_for_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert driver_version() == "570.86.15"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert driver_version() is None
