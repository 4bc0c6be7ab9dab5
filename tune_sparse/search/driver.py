"""A search: a super-adapter trained once, its slices scored by warm workers, the best evaluated on test examples.

searches/<search_id>/result.json      the front, the winner, and what they are compared with
searches/<search_id>/winner/          adapter (PEFT), validation, outcomes on test examples; heuristic/ likewise
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from tune_sparse.errors import RunError
from tune_sparse.files import write_json
from tune_sparse.ledger.lease import FolderLease
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.search.final_evaluation import final_evaluation
from tune_sparse.search.journal import Candidates, SearchJournal
from tune_sparse.search.plan import SearchPlan, config_json
from tune_sparse.search.racing import Race
from tune_sparse.search.session import SearchSession, train
from tune_sparse.sweep.cards import Device, check_devices, cluster_devices, local_devices
from tune_sparse.sweep.ray_session import nodes, ray_session, run_trials, stop_on_signals
from tune_sparse.sweep.resources import Placement

logger = logging.getLogger(__name__)


def run_search(plan: SearchPlan, report: Callable[[str], None] = logger.info) -> dict[str, Any]:
    """Run a search that was prepared; returns what `result.json` holds. Running it again continues it.

    Raises `InputError` if no GPU can hold the super-adapter's training, `RunError` for a training that fails. A search
    that was stopped returns its reason as `stopped`.
    """
    if "RAY_ADDRESS" not in os.environ:
        _check_devices(plan, local_devices())
    ledger, sweep = Ledger(plan.config.sweep.results_dir), plan.config.sweep
    folder = ledger.folder / "searches" / plan.search_id
    started = time.perf_counter()
    for line in plan.protocol.lines():
        report(line)
    with FolderLease(ledger.folder) as lease:
        ledger.remove_partial()
        journal = SearchJournal(folder)
        write_json(folder / "config.json", config_json(plan))
        with ray_session(sweep) as workers:
            Placement(sweep, nodes).check_placeable([plan.run])
            _check_devices(plan, cluster_devices(nodes()))
            check_shared(ledger, lease.token)
            found = _run_stages(SearchSession(plan, ledger, journal, lease.token, workers, report))
    found = {"search_id": plan.search_id, "folder": str(folder), "protocol": asdict(plan.protocol)} | found
    if "stopped" not in found:
        found["seconds"] = time.perf_counter() - started
        write_json(folder / "result.json", found)
    return found


def _check_devices(plan: SearchPlan, devices: Sequence[Device]) -> None:
    check_devices(plan.config.sweep, [plan.run], {plan.run.cell.model: plan.dims}, devices)


def _run_stages(session: SearchSession) -> dict[str, Any]:
    """Train the super-adapter, race its slices, and evaluate the best; or why the search was stopped before."""
    stopped = train(session.plan.run, session)
    if stopped:
        return {"stopped": stopped}
    race, stopped = run_race(session)
    return {"stopped": stopped} if stopped else final_evaluation(session, race)


def check_shared(ledger: Ledger, token: str) -> None:
    """Raise `InputError` where a node does not see the results folder: slices are cut from the super-adapter there."""
    if "RAY_ADDRESS" in os.environ:
        from trainables.remote_ledger import check_visible

        check_visible(ledger.folder.resolve(), token, "a search needs", lambda resources: True)


def run_race(session: SearchSession) -> tuple[Race, str | None]:
    """Score candidates through one Tuner; returns the race and why it was stopped, if it was."""
    from tune_sparse.search.callbacks import RacingScheduler, SearchCallback
    from tune_sparse.search.samplers import searcher_named
    from tune_sparse.search.searcher import JournaledSearcher
    from tune_sparse.search.trainable import CandidateTrainable
    from tune_sparse.sweep.tune_parts import Stop

    plan, journal = session.plan, session.journal
    config, seed = plan.config, plan.run.cell.seed
    settings, race = session.settings(plan.run), Race(plan.selection_examples, config.minimises_cost)
    search = JournaledSearcher(
        searcher_named(config.sampler, plan.space, plan.dims.num_layers, seed, config.objectives),
        journal,
        Candidates(session.ledger.folder, plan.run.run_id),
        race,
        plan.cost,
        lambda ranks, stages: {"trial": settings | {"ranks": ranks, "stages": stages}},
        config.trials,
        seed,
        config.is_racing,
    )
    stop = Stop()
    callback = SearchCallback(search, journal, config.trials, stop, config.sweep.max_retries, session.report)
    at_once = 1 if config.in_order else session.workers
    with stop_on_signals(stop):
        run_trials(CandidateTrainable, search, callback, stop, RacingScheduler(search), at_once)
    if not race.complete() and not stop.reason:
        raise RunError(f"a search needs a candidate that can be scored, all failed. See {journal.folder / 'trials'}.")
    return race, stop.reason
