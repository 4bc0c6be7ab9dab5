"""The benchmark for a GPU runs where there is none, with nothing but the core's own libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bench_gpu
import pytest
import torch
from simulated_device import DEVICE, simulated_device

BENCH = Path(__file__).with_name("bench_gpu.py")
ABSENT = ("ray", "optuna", "mlflow", "datasets", "pandas", "pyarrow", "lm_eval", "scipy", "sklearn", "matplotlib")
BARE = f"""
import runpy, sys
sys.modules |= dict.fromkeys({(*ABSENT, "trainables", "tune_sparse.ledger")!r})  # None: not to be found
sys.argv, sys.path[0] = sys.argv[1:], {str(BENCH.parent)!r}  # as `python tests/bench_gpu.py` has them
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_bench(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE, str(BENCH), *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"HOME": "/"},
    )


def test_the_smallest_shapes_run_from_the_source_tree_without_the_other_libraries(tmp_path: Path) -> None:
    run = run_bench(tmp_path, "--smoke", "--output", "out", "--work-dir", str(tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    figures = json.loads(run.stdout.splitlines()[-1])
    assert list(figures["cells"]) == ["sparse-to-sparse", "sparse-to-dense", "dense", "stock PEFT"]
    found = [item for part in ("cells", "layers", "generation", "scoring") for item in figures[part].values()]
    assert not any("failed" in item for item in found), found
    assert all(figures["cells"][mode]["train_tokens_per_second"] > 0 for mode in figures["cells"])
    assert len(list((tmp_path / "out").glob("*.json"))) == 4
    assert json.loads((tmp_path / "out" / "cells.json").read_text())["cells"] == figures["cells"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the checkpoint is gone


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The benchmark in this process, which it leaves as it was."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    return lambda *options: bench_gpu.main([*options, "--output", str(tmp_path), "--work-dir", str(tmp_path)])


def test_without_a_gpu_true_sizes_are_refused(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 2
    assert capsys.readouterr().err == ("bench_gpu needs a GPU, torch sees none. --smoke runs tiny shapes on a CPU.\n")


def test_what_would_not_end_in_time_is_left_out_and_named(
    main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--smoke", "--parts", "layers", "--minutes", "0") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["layers"] == {"16 tokens": {"left_out": "may take 10 s, 0 s are left"}}
    assert "cells" not in figures


def run_parts(folder: Path) -> dict[str, Any]:
    from gpu_parts import SMOKE, Bench, parts
    from random_inputs import write_checkpoint

    write_checkpoint(SMOKE.config(), folder / "model", SMOKE.dtype, torch.device("cpu"))
    with simulated_device():
        bench = Bench(SMOKE, folder / "model", DEVICE)
        return {name: measure(bench) for items in parts(SMOKE).values() for name, (measure, _) in items.items()}


@pytest.mark.xdist_group("simulated device")
@pytest.mark.slow
def test_every_part_runs_on_a_device(device_process: ProcessPoolExecutor, tmp_path: Path) -> None:
    figures = device_process.submit(run_parts, tmp_path).result()
    assert figures["sparse-to-sparse"]["implementations"] == {"effective-weight": 14}
    assert figures["answers"]["answers"] == 8
