"""Sweeps that find, through the real Ray Tune: finished by a plain sweep, within a budget, killed twice."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from test_sweep import Driver

from tune_sparse.cli import main
from tune_sparse.ledger.curves import Bracket, known_curves

pytestmark = [pytest.mark.xdist_group("machine"), pytest.mark.slow]

FEW = ["steps=3", "eval_every=3", "n_train=20", "n_selection=4", "n_test=10", "max_tokens=64", "max_new_tokens=8"]
FIND = ["--find", "perplexity=1.10"]


def brackets(driver: Driver) -> list[Bracket]:
    [sweep] = driver.ledger.sweeps()
    return [known.bracket for known in known_curves(sweep, driver.ledger.record)]


def written(driver: Driver) -> dict[str, int]:
    """When each run was."""
    return {run: (driver.ledger.run_folder(run) / "result.json").stat().st_mtime_ns for run in driver.done()}


@pytest.fixture
def arguments(llama: Path, real_examples: Path) -> list[str]:
    """Two curves of five levels, on a model that needs no minutes of base training; of a text, which has no chance."""
    matrix = ["--tasks", "wikitext2", "--methods", "random", "--sparsities", "0", "0.1", "0.3", "0.5", "0.7", "0.9"]
    own = ["smoke", "--data-dir", str(real_examples), "--models", str(llama), "--no-report", "--workers", "1"]
    return [*own, *matrix, "--set", *FEW]


def test_a_sweep_runs_what_decides_its_curves_and_no_more(
    arguments: list[str], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["sweep", *arguments, "--results-dir", str(results), *FIND]
    assert main([*asked, "--compare-at", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["left"] == 11 - found["ran"] > 0
    assert [curve["is_decided"] for curve in found["curves"]] == [True, True]
    assert main(["status", "--results-dir", str(results)]) == 0
    assert "random sparse-to-dense: " in capsys.readouterr().out
    assert main([*asked, "--compare-at", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ran"] == 0
    assert main([*asked, "--compare-at", "0.7"]) == 2
    assert "compare_at is fixed before the first run" in capsys.readouterr().err


def test_a_budget_ends_a_sweep_that_a_plain_one_finishes_and_nothing_is_run_twice(
    arguments: list[str], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["sweep", *arguments, "--results-dir", str(results)]
    assert main([*asked, *FIND, "--budget", "3runs"]) == 1
    assert "the budget of 3 runs is spent" in capsys.readouterr().err
    driver = Driver(arguments, results)
    first = written(driver)
    assert len(first) == 3
    assert main(asked) == 0
    assert len(driver.done()) == 11
    assert {run: written(driver)[run] for run in first} == first
    capsys.readouterr()
    assert main([*asked, *FIND, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ran"] == 0, "the other way round"


def test_a_sweep_that_was_killed_twice_finds_what_an_undisturbed_one_does(
    arguments: list[str], results: Path, tmp_path: Path
) -> None:
    undisturbed = Driver([*arguments, *FIND], tmp_path / "undisturbed")
    status, printed = undisturbed.run()
    assert status == 0, printed
    driver = Driver([*arguments, *FIND], results)
    for done in (1, 3):
        process = driver.start_held(done)
        driver.wait_until(lambda n=done: len(driver.done()) >= n and any(results.glob("runs/.*/metrics.jsonl")))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        driver.release()
        time.sleep(3)  # a worker that outlives the driver may still finish the run it was at
    kept = written(driver)
    status, printed = driver.run()
    assert status == 0, printed
    assert brackets(driver) == brackets(undisturbed)
    assert driver.done() == undisturbed.done()
    whole = Driver(arguments, results)
    status, printed = whole.run()
    assert status == 0, printed
    assert len(whole.done()) == 11
    assert {run: written(whole)[run] for run in kept} == kept
