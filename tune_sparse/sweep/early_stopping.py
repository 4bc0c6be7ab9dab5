"""Which trainings Ray Tune stops early: its ASHA, one for the siblings of each cell, which alone are compared.

ASHA decides as trainings arrive at a rung, by those that came before. Decisions follow from the ledger's rungs in their
order, so a driver that goes on begins with those of the one before it. With several workers another order of arrival
may stop others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from tune_sparse.config import EarlyStopping
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.ledger.rungs import Rung, RungJournal
from tune_sparse.sweep.siblings import siblings_of
from tune_sparse.sweep.tune_parts import Unsaved


class EarlyStopper(Unsaved, FIFOScheduler):
    """Says of each training, as it reaches a rung, whether it goes on; begins with the rungs that the ledger knows.

    runs: those that may be judged, by id. rivals: equal for two runs that are compared.
    """

    def __init__(
        self,
        config: EarlyStopping,
        runs: Mapping[str, Run],
        journal: RungJournal,
        rivals: Callable[[Run], tuple[Any, ...]] = siblings_of,
    ) -> None:
        super().__init__()
        assert config.stop_early is not None
        self._config, self._by, self._runs, self._journal = config, config.stop_early, runs, journal
        self._rivals = rivals
        self._ashas: dict[tuple[Any, ...], ASHAScheduler] = defaultdict(self._asha)
        self._values: dict[str, dict[int, float]] = defaultdict(dict)
        self._stopped: dict[str, int] = {}
        for rung in journal.read():
            self._judge(rung)

    def _asha(self) -> ASHAScheduler:
        """Its rungs are 1, r, r^2, ...: which step of a training that is, is ours."""
        reduction, mode = self._config.reduction, "min" if self._by == "loss" else "max"
        last = reduction ** len(self._config.fractions) - 1
        return ASHAScheduler("rung", "value", mode, max_t=last, reduction_factor=reduction, stop_last_trials=False)

    def _judge(self, rung: Rung) -> None:
        """Tell ASHA a rung that it does not know yet."""
        run = self._runs.get(rung.run_id)
        steps = self._config.rung_steps(run.protocol.steps) if run else ()
        if run is None or rung.by != self._by or rung.step not in steps or rung.step in self._values[rung.run_id]:
            return
        self._values[rung.run_id][rung.step] = rung.value
        asha, trial = self._ashas[self._rivals(run)], SimpleNamespace(trial_id=rung.run_id)
        asha.on_trial_add(None, trial)
        reached = {"rung": self._config.reduction ** steps.index(rung.step), "value": rung.value}
        if asha.on_trial_result(None, trial, reached) == TrialScheduler.STOP:
            self._stopped.setdefault(rung.run_id, rung.step)

    def settings(self, run: Run) -> dict[str, Any]:
        """What the trial of a run is told of its rungs."""
        return {"rungs": {"steps": self._config.rung_steps(run.protocol.steps), "by": self._by}}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        for step, value in result["rungs"]:
            rung = Rung(result["run_id"], step, self._by, value)
            if step not in self._values[rung.run_id]:
                self._journal.append(rung)
            self._judge(rung)
        return TrialScheduler.STOP if result["run_id"] in self._stopped else TrialScheduler.CONTINUE

    def is_stopped(self, run_id: str) -> bool:
        return run_id in self._stopped

    def record(self, run: Run) -> Record:
        """The record of a run that is stopped."""
        where = {"step": self._stopped[run.run_id], "steps": run.protocol.steps, "by": self._by}
        values = {str(step): value for step, value in self._values[run.run_id].items()}
        return Record(run.run_id, run.identity, "stopped", stopped=where | {"values": values})
