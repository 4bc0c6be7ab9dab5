"""Early stopping through the real Ray Tune: a sweep of one cell, stopped, told again, killed, and run to its end."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from factories import TINY_PROTOCOL
from test_sweep import Driver

from tune_sparse.config import EarlyStopping, SweepConfig
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.rungs import RungJournal
from tune_sparse.sweep.driver import run_sweep
from tune_sparse.sweep.plan import Plan
from tune_sparse.sweep.preparation import prepare

pytestmark = pytest.mark.xdist_group("machine")

RATES = (1e-2, 1e-6)


def plan_of(llama: Path, results: Path, stop_early: str | None) -> Plan:
    """A good rate and one that learns nothing, in this order, of one cell."""
    config = SweepConfig(
        models=(str(llama),),
        tasks=("boolq",),
        methods=("unstructured",),
        sparsities=(0.5,),
        modes=("sparse-to-dense",),
        protocol=replace(TINY_PROTOCOL, steps=8, eval_every=8),
        data_dir=Path("synthetic"),
        results_dir=results,
        workers=1,
    )
    rates = [replace(config.protocol, learning_rate=rate, final_learning_rate=rate) for rate in RATES]
    plans = [prepare(replace(config, protocol=protocol)) for protocol in rates]
    runs = {run_id: run for plan in plans for run_id, run in plan.runs.items()}
    stopping = EarlyStopping(stop_early=stop_early, rungs=(0.25, 0.5), reduction=2)
    record = replace(plans[0].record, cells=tuple(cell for plan in plans for cell in plan.record.cells))
    return replace(plans[0], config=replace(config, early_stopping=stopping), runs=runs, record=record)


def test_a_worse_sibling_is_stopped_and_once_more_if_its_record_is_lost(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama, tmp_path, "loss")
    ledger, (good, bad) = Ledger(tmp_path), plan.runs
    result = run_sweep(plan)
    assert (result.done, result.stopped_early, result.left, result.is_complete) == (1, 1, 0, True)
    record = ledger.record(bad)
    assert record is not None
    assert record.stopped is not None
    assert (record.status, record.metrics, record.stopped["step"]) == ("stopped", {}, 2)
    rungs = [(rung.run_id, rung.step) for rung in RungJournal(tmp_path).read()]
    assert rungs == [(good, 2), (good, 4), (bad, 2)]
    assert ledger.checkpoint(bad).exists()

    shutil.rmtree(ledger.run_folder(bad))  # as if the driver had been killed between the rung and the record
    again = run_sweep(plan)
    assert (again.ran, again.stopped_early) == (0, 1)
    assert ledger.record(bad) == record


@pytest.mark.slow
def test_trainings_of_a_driver_that_is_killed_at_each_rung_have_the_bits_of_undisturbed_ones(
    llama: Path, tmp_path: Path
) -> None:
    cell = ["--tasks", "boolq", "--methods", "unstructured", "--sparsities", "0.5", "--modes", "sparse-to-dense"]
    few = ["steps=24", "eval_every=24", "warmup_steps=1", "n_train=40", "n_selection=8", "n_test=20"]
    own = ["smoke", "--data-dir", "synthetic", "--models", str(llama), "--no-report", "--workers", "1", *cell]
    swept = [*own, "--set", *few, "--axis", "learning_rate:final_learning_rate=1e-2:1e-2,1e-6:1e-6"]
    stopping = [*swept, "--stop-early", "loss", "--rungs", "1/4", "1/2", "--reduction", "2"]
    undisturbed, killed = Driver(stopping, tmp_path / "undisturbed"), Driver(stopping, tmp_path / "killed")
    for rungs in (1, 2):
        process = killed.start()
        killed.wait_until(lambda n=rungs: len(list(RungJournal(killed.results).read())) >= n)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(3)  # a worker that outlives the driver may still finish the run it was at
    for driver in (undisturbed, killed):
        status, printed = driver.run()
        assert status == 0, printed
    assert [*RungJournal(killed.results).read()] == [*RungJournal(undisturbed.results).read()]
    [good] = killed.done()
    for driver in (undisturbed, killed):
        status, printed = Driver(swept, driver.results).run()
        assert status == 0, printed
    [bad] = killed.done() - {good}
    assert "goes on after step 6" in (killed.ledger.run_folder(bad) / "train.log").read_text(), "it is taken up"
    assert not killed.ledger.checkpoint(bad).exists()
    for run_id in killed.done():
        records = [driver.ledger.record(run_id) for driver in (undisturbed, killed)]
        metrics = [record.metrics for record in records if record]
        assert metrics[0] == metrics[1]
        lines = [(d.ledger.run_folder(run_id) / "metrics.jsonl").read_text() for d in (undisturbed, killed)]
        assert lines[0] == lines[1]
