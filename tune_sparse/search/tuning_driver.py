"""A search over trainings: each trial an ordinary run of the ledger, the best chosen on selection examples.

tunings/<tune_id>/config.json           what was requested
tunings/<tune_id>/trials/<number>.json  one suggestion of the sampler, and what became of it
tunings/<tune_id>/result.json           the trials, and the best of them
"""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress
from functools import partial
from typing import Any

from tune_sparse.errors import InputError
from tune_sparse.files import write_json
from tune_sparse.ledger.lease import FolderLease
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.ledger.rungs import RungJournal
from tune_sparse.search.journal import Journal
from tune_sparse.search.tuning_config import OBJECTIVES, TuneConfig
from tune_sparse.search.tuning_plan import TunePlan
from tune_sparse.search.tuning_result import result_of
from tune_sparse.search.tuning_trial import Trial
from tune_sparse.sweep.cards import check_devices, cluster_devices
from tune_sparse.sweep.driver import gathered
from tune_sparse.sweep.preparation import check_start
from tune_sparse.sweep.progress import Progress
from tune_sparse.sweep.protocol_in_use import protocol_in_use
from tune_sparse.sweep.ray_session import nodes, ray_session, run_trials, stop_on_signals
from tune_sparse.sweep.resources import Placement, trial_settings
from tune_sparse.sweep.siblings import rivals_of

logger = logging.getLogger(__name__)


def run_tuning(plan: TunePlan) -> dict[str, Any]:
    """Run a search that was prepared; returns what `result.json` holds, and why it was `stopped`, if it was. Running it
    again continues it. Raises `InputError` before anything trains if anything is wrong with the input."""
    sweep, ledger = plan.config.sweep, Ledger(plan.config.sweep.results_dir)
    for line in protocol_in_use(sweep, plan.corners.examples).lines():
        logger.info(line)
    folder = ledger.folder / "tunings" / plan.tune_id
    check_start(plan.corners, ledger, list(plan.corners.runs.values()))
    with FolderLease(ledger.folder) as lease:
        ledger.remove_partial()
        journal = Journal(folder, Trial)
        write_json(folder / "config.json", {"tune_id": plan.tune_id, "trials": plan.config.trials, **plan.settings})
        stopped = _search(plan, ledger, journal, lease)
        if not lease.lost.is_set():
            ledger.remove_partial()
    found = result_of(plan, ledger, journal)
    if stopped is None:
        write_json(folder / "result.json", found)
    return found | {"stopped": stopped}


def _search(plan: TunePlan, ledger: Ledger, journal: Journal[Trial], lease: FolderLease) -> str | None:
    """Try settings through one Tuner; returns why it ended early, if it did."""
    sweep, corners = plan.config.sweep, list(plan.corners.runs.values())
    with ray_session(sweep) as workers, gathered(ledger, lease.token, corners):
        from trainables.cell import CellTrainable
        from tune_sparse.search.tuning_searcher import TrainingSearcher
        from tune_sparse.sweep.callbacks import LedgerCallback
        from tune_sparse.sweep.early_stopping import EarlyStopper
        from tune_sparse.sweep.tune_parts import Stop

        placement, stop = Placement(sweep, nodes), Stop()
        placement.check_placeable(corners)
        check_devices(plan.corners.config, corners, plan.corners.dims, cluster_devices(nodes()))
        runs = known_runs(plan, journal)
        rivals = partial(rivals_of, by_sparsity=len(plan.config.objectives) > 1)
        stopping, stopper = sweep.early_stopping, None
        if stopping.stop_early:
            stopper = EarlyStopper(stopping, runs, RungJournal(ledger.folder), rivals)

        def make_trial(run: Run) -> dict[str, Any]:
            trial = trial_settings(run, sweep, ledger.folder, placement) | {"token": lease.token}
            return trial | (stopper.settings(run) if stopper else {})

        sampler = sampler_of(plan.config)
        search = TrainingSearcher(
            *(sampler, journal, plan.config.objectives, plan.run_at, runs, ledger, stopper, make_trial),
            *(plan.config.trials, stop),
        )
        progress = Progress(plan.config.trials, journal.completed)
        callback = LedgerCallback(
            *(ledger, runs, {}, progress, None, lease, stop, placement, search.requeue, sweep.max_retries),
            stopper=stopper,
        )
        with progress.shown(workers), stop_on_signals(stop):
            run_trials(CellTrainable, search, callback, stop, stopper, workers)
        if not lease.lost.is_set():
            callback.record_unfinished()
        search.settle()
        return stop.reason


def known_runs(plan: TunePlan, journal: Journal[Trial]) -> dict[str, Run]:
    """The runs of what a journal says was suggested."""
    found = []
    for trial in journal.suggestions:
        with suppress(InputError):  # settings that do not go together, which the search says
            found.append(plan.run_at(trial.point))
    return {run.run_id: run for run in found}


def sampler_of(config: TuneConfig) -> Any:
    """The sampler of a search, one of Optuna's under Ray Tune's interface."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    from tune_sparse.search.samplers import OPTUNA_SAMPLERS

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate
        sampler = OPTUNA_SAMPLERS[config.sampler](config.sweep.seeds[0])
    names, modes = list(config.objectives), [OBJECTIVES[name].mode for name in config.objectives]
    return OptunaSearch(
        space={dimension.name: dimension.distribution() for dimension in config.space},
        metric=names if len(names) > 1 else names[0],
        mode=modes if len(modes) > 1 else modes[0],
        sampler=sampler,
    )
