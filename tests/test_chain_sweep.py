"""A chain of levels through Ray Tune, whose worker is killed in the midst of a level."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE_SECONDS, held_sweep, wait_until

from tune_sparse.ledger.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("machine")]

CHAIN = ["--tasks", "boolq", "--data-dir", "synthetic", "--methods", "unstructured", "--modes", "masked-finetuning"]
CHAIN += ["--schedules", "iterative", "--no-report", "--workers", "2"]
FEW = ["steps_per_level=2", "warmup_steps=0", "global_batch_size=4", "n_train=16", "n_selection=4", "n_test=8"]
FEW += ["max_tokens=128", "max_new_tokens=4", "eval_every=2"]


def arguments(llama: Path, results: Path, sparsity: str, *more: str) -> list[str]:
    own = ["--models", str(llama), "--results-dir", str(results), "--sparsities", sparsity]
    return ["sweep", *CHAIN, *own, *more, "--set", *FEW]


def done(results: Path) -> dict[str, int]:
    """{finished run: when it was written}"""
    ledger = Ledger(results)
    found = (results / "runs").glob("[!.]*/result.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found if ledger.is_done(path.parent.name)}


def in_level(results: Path, sparsity: str) -> bool:
    """Whether a level trains."""
    return any(path.stat().st_size for path in results.glob(f"runs/.*_s{sparsity}_*/metrics.jsonl"))


def run(llama: Path, results: Path, sparsity: str) -> str:
    command = [sys.executable, "-m", "tune_sparse", *arguments(llama, results, sparsity)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_a_chain_killed_in_its_third_level_keeps_two_and_goes_on(llama: Path, tmp_path: Path) -> None:
    results, hold = tmp_path / "results", tmp_path / "hold"
    hold.touch()
    held = [*held_sweep(hold, 2), *arguments(llama, results, "0.5")]
    sweep = subprocess.Popen(held, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: in_level(results, "50"))
    kept = done(results)
    assert [name.split("_s")[1][:2] for name in sorted(kept)] == ["10", "30"], "each began when the one before was done"
    for child in psutil.Process(sweep.pid).children(recursive=True):
        if "CellTrainable" in " ".join(child.cmdline()):
            child.kill()
    hold.unlink()
    out, err = sweep.communicate(timeout=PATIENCE_SECONDS)
    assert sweep.returncode == 0, out + err
    ended = done(results)
    assert len(ended) == 3
    assert kept.items() <= ended.items()

    assert "1 trainings in" in run(llama, results, "0.7")
    larger = done(results)
    assert len(larger) == 4
    assert ended.items() <= larger.items()


def test_later_levels_are_left_where_one_fails_for_good(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tune_sparse", *arguments(llama, tmp_path, "0.5"), "learning_rate=1e30"]
    command += ["final_learning_rate=0", "max_grad_norm=1e30"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 1
    assert "its level before" in ended.stderr
    assert not done(tmp_path)
    assert len(list((tmp_path / "runs").glob("[!.]*"))) == 1, "the first level failed, and no other was tried"
