"""The Ray Tune trainable: one trial is one cell, and its worker stays warm for the next."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from trainables.process import prepare_process
from tune_sparse.ledger.run import Run
from tune_sparse.watchdog import heartbeat, watchdog

REPORT_SECONDS = 5.0
"""A training reports at least so often, which is also how fast it can be stopped; scoring is not interrupted."""


class CellTrainable(tune.Trainable):
    """Runs `config["trial"]`, which has a `run` (as a mapping), the `results_dir` of its ledger, the `token` with which
    the driver holds it, the `resources` that the trial holds, the `hang_seconds` after which a step without progress
    ends the worker, whether only `deterministic` algorithms compute, for the backend cerebras the `cerebras` settings,
    and, where it may be stopped early, its `rungs`.

    A result reports step, steps, train_loss and the rungs that were reached since the last, and nothing is computed
    after a rung before the next result is asked for; the last one is `done` and has the run's status and accuracy.
    """

    def setup(self, config: dict[str, Any]) -> None:
        prepare_process(config["trial"]["deterministic"])
        from trainables.worker import WorkerCache

        self._worker = WorkerCache()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._steps.close()
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        from trainables import torch_backend
        from trainables.cs3 import on_cs3
        from trainables.hardware import keep_within
        from trainables.pipeline import run_cell
        from trainables.remote_ledger import connect_ledger
        from trainables.rungs import Rungs

        trial = config["trial"]
        keep_within(trial["resources"].get("GPU", 0))
        run = Run.from_config(trial["run"])
        self._rungs = Rungs(**trial.get("rungs", {"steps": (), "by": "loss"}))
        stage = on_cs3(trial["cerebras"]) if run.cerebras else partial(torch_backend.train_stage, rungs=self._rungs)
        ledger = connect_ledger(Path(trial["results_dir"]), trial["token"])
        self._steps = run_cell(run, ledger, self._worker, stage, trial["resources"])
        self._watchdog = partial(watchdog, ledger.hang_report(run.run_id), trial["hang_seconds"])
        self._result: dict[str, Any] = {"run_id": run.run_id, "steps": run.own_steps, "step": 0}

    def step(self) -> dict[str, Any]:
        until = time.monotonic() + REPORT_SECONDS
        try:
            with self._watchdog():
                while time.monotonic() < until and not self._rungs.is_waiting:
                    step = next(self._steps)
                    heartbeat()
                    if step is not None:
                        self._result |= {"step": step.step, "train_loss": step.loss}
        except StopIteration as stop:
            record = stop.value
            return self._result | {
                "done": True,
                "rungs": [],
                "status": record.status,
                "accuracy": record.metrics.get("accuracy"),
                "model_loads": self._worker.loads,
                "pid": os.getpid(),
            }
        return self._result | {"done": False, "rungs": self._rungs.told()}

    def cleanup(self) -> None:
        self._steps.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: an unfinished run resumes from its checkpoint in the ledger."""

    def load_checkpoint(self, checkpoint: str | None) -> None:
        """Nothing was saved."""
