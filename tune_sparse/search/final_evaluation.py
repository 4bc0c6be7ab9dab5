"""The end of a search: winner and heuristic written, validated, scored on test examples, beside a plain LoRA."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_sparse.data.tasks import task_named
from tune_sparse.errors import RunError
from tune_sparse.evaluation.outcomes import Outcome, read_outcomes
from tune_sparse.files import read_json
from tune_sparse.lora.rank_space import Ranks
from tune_sparse.search.journal import configuration_key
from tune_sparse.search.racing import Correctness, Race, accuracy_difference
from tune_sparse.search.session import SearchSession, train
from tune_sparse.sweep.ray_session import capacity, run_trials


def final_evaluation(session: SearchSession, race: Race) -> dict[str, Any]:
    """Write and score on test examples winner and heuristic, beside the maximal and a plain LoRA of that size."""
    plan, suggestions, folder = session.plan, session.journal.suggestions, session.folder
    by_key = {configuration_key(s.ranks): s.ranks for s in suggestions}
    winner, heuristic = by_key[race.winner()], plan.space.heuristic(plan.dims.num_layers)
    chosen = {"winner": winner, "heuristic": heuristic}
    _finish(session, chosen)
    plain = plan.plain_run(plan.parameters(winner))
    stopped = train(plain, session)
    if stopped:
        raise RunError(f"a search must not be {stopped} before its end. Start it again: it goes on.")
    maximal = plan.parameters(plan.space.maximal(plan.dims.num_layers))
    sizes = {name: plan.parameters(ranks) for name, ranks in chosen.items()} | {"maximal": maximal}
    sizes["plain"] = plain.protocol.lora_rank * sum(sum(size) for size in plan.sizes.values())
    scored = {name: read_outcomes(folder / name / "examples.parquet") for name in chosen}
    for name, run in (("maximal", plan.run), ("plain", plain)):
        scored[name] = read_outcomes(session.ledger.run_folder(run.run_id) / "examples.parquet")
    metric = task_named(plan.run.cell.task).primary_metric
    return {
        "front": [
            {
                "ranks": by_key[key],
                "parameters": plan.parameters(by_key[key]),
                "parameters_fraction": plan.parameters(by_key[key]) / maximal,
                "accuracy": race.correctness[key].accuracy,
            }
            for key in race.front()
        ],
        "winner": winner,
        "primary_metric": metric,
        "test": {name: _on_test(outcomes, scored["maximal"], metric, sizes[name]) for name, outcomes in scored.items()},
        "selection_examples": race.n,
        "candidates": len(race.correctness),
        "suggestions": len(suggestions),
        "stopped_early": sum(s.state == "stopped" for s in suggestions),
        "failed": sum(s.state == "failed" for s in suggestions),
        "answered_fraction": sum(c.count for c in race.correctness.values()) / (race.n * len(race.correctness)),
        "super_adapter_run": plan.run.run_id,
        "plain_run": plain.run_id,
    }


def _on_test(outcomes: Sequence[Outcome], maximal: Sequence[Outcome], metric: str, parameters: int) -> dict[str, Any]:
    """Accuracy on test examples by a metric, and its paired difference from the maximal's with a 95% interval, which
    the maximal itself has not."""
    mine, other = (
        Correctness(len(found)).adding((i, o.is_right(metric)) for i, o in enumerate(found))
        for found in (outcomes, maximal)
    )
    difference, low, high = (None, None, None) if outcomes is maximal else accuracy_difference(mine, other)
    return {
        "accuracy": mine.accuracy,
        "parameters": parameters,
        "difference_from_maximal": difference,
        "interval_95": [low, high],
    }


def _finish(session: SearchSession, chosen: Mapping[str, Ranks]) -> None:
    """Let workers write, merge, validate and score slices in `folder/<name>`, unless that was done before."""
    from ray import tune

    from tune_sparse.search.trainable import CandidateTrainable
    from tune_sparse.sweep.scheduler import ResourceQueue
    from tune_sparse.sweep.sources import Listed

    folder = session.folder
    left = {name: ranks for name, ranks in chosen.items() if not _is_finished(folder / name, ranks)}
    settings = session.settings(session.plan.run)
    trials = []
    for name, ranks in left.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        trials.append(settings | {"ranks": ranks, "stages": [], "folder": str((folder / name).resolve())})
    if trials:
        queue = ResourceQueue({"slices": Listed(trials)}, dict, capacity, session.workers)
        run_trials(CandidateTrainable, queue, tune.Callback())
    for name, ranks in left.items():
        if not _is_finished(folder / name, ranks):
            raise RunError(f"a slice must pass its validation, the {name} in {folder} did not. See its report there.")


def _is_finished(folder: Path, ranks: Ranks) -> bool:
    done = folder / "result.json"
    return done.exists() and read_json(done)["ranks"] == ranks
