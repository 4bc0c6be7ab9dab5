"""A search: a super-adapter trained once, its slices scored by warm workers, and the best of them proved on test rows.

searches/<search_id>/result.json      the front, the winner, and what they are compared with
searches/<search_id>/winner/          adapter (PEFT), validation, outcomes on test rows; heuristic/ likewise
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tune_sparse.config import FLOPS_TOKENS, SweepConfig
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import InputError, RunError
from tune_sparse.evaluation.outcomes import Outcome, read_outcomes
from tune_sparse.files import read_json, write_json
from tune_sparse.identity import hash_json
from tune_sparse.ledger.lease import Holder
from tune_sparse.ledger.ledger import Ledger, Run
from tune_sparse.lora.rank_space import Ranks, Space, SuperAdapter, check_space
from tune_sparse.models.checkpoints import Shape, prepare_models
from tune_sparse.models.toy_models import TOY_MODELS
from tune_sparse.search.config import SearchConfig
from tune_sparse.search.journal import Candidates, SearchJournal, configuration_key
from tune_sparse.search.racing import Correctness, Race, difference_interval
from tune_sparse.sweep.driver import capacity, fit_trials, nodes, started_ray, stop_on_signals
from tune_sparse.sweep.plan import check_folder, check_names, plan_sweep
from tune_sparse.sweep.resources import Placement, available_cores

logger = logging.getLogger(__name__)

COPIES = 3
"""Of a model in a worker: as it came, pruned, and as a slice makes it."""


@dataclass(frozen=True)
class SearchPlan:
    """A search that was found sound."""

    config: SearchConfig
    run: Run
    """of the super-adapter"""
    shape: Shape
    search_id: str
    sizes: dict[str, tuple[int, int]]
    """{adapted matrix: (O, I)}"""

    @property
    def space(self) -> Space:
        return self.config.space

    def parameters(self, ranks: Ranks) -> int:
        return self.space.parameters(ranks, self.sizes)

    def cost(self, ranks: Ranks) -> float:
        """What the search minimises. inference_flops: of the adapters beside the model, at 2 a parameter and token;
        those of the model itself are the same for every candidate."""
        per_parameter = 2 * FLOPS_TOKENS if "inference_flops" in self.config.objectives else 1
        return per_parameter * self.parameters(ranks)

    def plain_run(self, parameters: int) -> Run:
        """A plain LoRA of the same modules, s and protocol, of the rank whose size is nearest to `parameters`."""
        of_rank_one = sum(sum(size) for size in self.sizes.values())
        rank, protocol = max(1, round(parameters / of_rank_one)), self.run.protocol
        alpha = protocol.lora_alpha / protocol.lora_rank * rank
        plain = SuperAdapter(Space.uniform(self.space.modules, rank))
        return replace(self.run, protocol=replace(protocol, lora_rank=rank, lora_alpha=alpha), super_adapter=plain)


def plan_search(config: SearchConfig) -> SearchPlan:
    """Check everything that would stop a search later. Raises `InputError`."""
    [task] = tasks_named(config.sweep.tasks[0]) if "+" not in config.sweep.tasks[0] else [None]
    if task is None or not hasattr(task, "training_pair"):
        raise InputError(
            f"a search maximises the accuracy of one task with questions, got {config.sweep.tasks[0]!r}. "
            "Choose a single task such as boolq."
        )
    plan = plan_sweep(config.sweep)
    if len(plan.runs) != 1:
        raise InputError("a search adapts one cell. Name one model, task, method, sparsity, mode and seed.")
    [run], [checkpoint] = plan.runs.values(), plan.checkpoints.values()
    sizes = matrix_sizes(checkpoint.shape)
    check_space(config.space, {name.split(".")[-2] for name in sizes}, config.sweep.protocol.lora_rank)
    _check_workers(config.sweep, checkpoint.shape)
    run = replace(run, super_adapter=config.super_adapter)
    identity = hash_json([run.identity, config.described()])
    search_id = f"{run.run_id}_{config.sampler}_{identity[:8]}"
    adapted = {name: size for name, size in sizes.items() if name.split(".")[-2] in config.space.modules}
    return SearchPlan(config, run, checkpoint.shape, search_id, adapted)


def matrix_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """{matrix: (O, I)} of a Llama or Mistral, by checkpoint name."""
    queries, keys = shape.head_dim * shape.heads, shape.head_dim * shape.key_value_heads
    sizes = {
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.channels, shape.hidden),
        "mlp.up_proj": (shape.channels, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.channels),
    }
    return {f"model.layers.{n}.{name}.weight": size for n in range(shape.layers) for name, size in sizes.items()}


def _check_workers(sweep: SweepConfig, shape: Shape) -> None:
    if sweep.workers is None or "RAY_ADDRESS" in os.environ or sweep.gpus_per_trial != 0:
        return
    each = COPIES * shape.pruned_weights * (2 if sweep.protocol.precision == "bfloat16" else 4)
    fitting = min(available_cores() // sweep.protocol.threads, int(psutil.virtual_memory().total // max(1, each)))
    if sweep.workers > fitting:
        raise InputError(
            f"a worker of a search needs {sweep.protocol.threads} cores and {each / 1e9:.1f} GB, so this machine holds "
            f"{fitting}, got {sweep.workers} workers. Lower workers."
        )


def run_search(config: SearchConfig, report: Callable[[str], None] = logger.info) -> dict[str, Any]:
    """Search, and prove what was found; returns what `result.json` holds. Starting it again continues it.

    Raises `InputError` before anything runs if anything is wrong with the input, and `RunError` for a training that
    fails. A search that was stopped returns its reason as `stopped`.
    """
    ledger = Ledger(config.sweep.results_dir)
    check_names(config.sweep)
    check_folder(ledger.folder)
    prepare_models([model for model in config.sweep.models if model in TOY_MODELS], report=report)
    plan = plan_search(config)
    folder = ledger.folder / "searches" / plan.search_id
    started = time.perf_counter()
    with Holder(ledger.folder) as holder:
        ledger.remove_partial()
        journal, candidates = SearchJournal(folder), Candidates(ledger.folder, plan.run.run_id)
        write_json(folder / "config.json", described(plan))
        with started_ray(config.sweep) as workers:
            Placement(config.sweep, nodes).check_placeable([plan.run])
            check_shared(ledger, holder.token)
            stopped = _train(plan.run, ledger, config.sweep, holder.token, report)
            race = None
            if not stopped:
                race, stopped = _race(plan, ledger, journal, candidates, 1 if config.in_order else workers, report)
            if not stopped and race is not None:
                found = _final_evaluation(plan, ledger, race, journal, folder, workers, holder.token, report)
    if stopped or race is None:
        return {"search_id": plan.search_id, "folder": str(folder), "stopped": stopped}
    found |= {"search_id": plan.search_id, "folder": str(folder), "seconds": time.perf_counter() - started}
    write_json(folder / "result.json", found)
    return found


def check_shared(ledger: Ledger, token: str) -> None:
    """Raise `InputError` where a node does not see the results folder: slices are cut from the super-adapter there."""
    if "RAY_ADDRESS" in os.environ:
        from trainables.remote_ledger import check_visible

        check_visible(ledger.folder.resolve(), token, "a search needs", lambda resources: True)


def described(plan: SearchPlan) -> dict[str, Any]:
    """What `config.json` holds."""
    config = plan.config
    return {
        "search_id": plan.search_id,
        "super_adapter_run": plan.run.run_id,
        **asdict(plan.run.cell),
        "space_name": config.space_name,
        "space": asdict(config.space),
        "sampling": config.sampling,
        "trials": config.trials,
        **config.described(),
        "maximal_parameters": plan.parameters(plan.space.maximal(plan.shape.layers)),
        "dimensions": plan.space.dimensions(plan.shape.layers),
        "started": time.time(),
    }


def _train(run: Run, ledger: Ledger, sweep: SweepConfig, token: str, report: Callable[[str], None]) -> str | None:
    """Train what is not in the ledger yet; returns why it was stopped, if it was."""
    if ledger.is_done(run.run_id):
        return None
    from ray import tune

    from trainables.cell import CellTrainable
    from tune_sparse.sweep.callbacks import Stop
    from tune_sparse.sweep.scheduler import ResourceQueue

    stop = Stop()
    report(f"training {run.run_id}")
    trial = _common(run, ledger, sweep) | {"token": token}
    with stop_on_signals(stop):
        fit_trials(
            CellTrainable, ResourceQueue({"training": [trial]}, dict, capacity, stop=stop), tune.Callback(), stop
        )
    record = ledger.record(run.run_id)
    if record is not None and record.status == "done":
        return None
    if stop.reason:
        return stop.reason
    error = record.error if record else None
    why = f"{error['class']}: {error['message']}" if error else "its worker ended unexpectedly"
    raise RunError(f"a search needs its trainings, {run.run_id} failed ({why}). Fix the cause and start it again.")


def _common(run: Run, ledger: Ledger, sweep: SweepConfig) -> dict[str, Any]:
    """What every trial of a search is given."""
    places = {"run": run.as_config(), "results_dir": str(ledger.folder.resolve())}
    return places | {"hang_seconds": sweep.hang_seconds, "resources": Placement(sweep, nodes).resources(run)}


def _race(
    plan: SearchPlan,
    ledger: Ledger,
    journal: SearchJournal,
    candidates: Candidates,
    workers: int,
    report: Callable[[str], None],
) -> tuple[Race, str | None]:
    """Score candidates through one Tuner; returns the race and why it was stopped, if it was."""
    from ray import tune

    from tune_sparse.search.samplers import JournaledSearcher, RacingScheduler, SearchCallback, searcher_named
    from tune_sparse.search.trainable import CandidateTrainable
    from tune_sparse.sweep.callbacks import Stop

    config, layers, seed = plan.config, plan.shape.layers, plan.run.cell.seed
    common, race = _common(plan.run, ledger, config.sweep), Race(selection_rows(plan), config.minimises_cost)
    search = JournaledSearcher(
        searcher_named(config.sampler, plan.space, layers, seed, config.objectives),
        journal,
        candidates,
        race,
        plan.cost,
        lambda ranks, stages: {"trial": common | {"ranks": ranks, "stages": stages}},
        config.trials,
        seed,
        config.is_racing,
    )
    stop = Stop()
    with tempfile.TemporaryDirectory(prefix="tune-sparse-") as scratch, stop_on_signals(stop):
        tune.Tuner(
            tune.with_resources(CandidateTrainable, tune.PlacementGroupFactory([common["resources"]])),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=RacingScheduler(search),
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=workers,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                callbacks=[SearchCallback(journal, config.trials, stop, report)],
                failure_config=tune.FailureConfig(max_failures=config.sweep.max_retries),
                stop=stop,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # as in `fit_trials`
            ),
        ).fit()
    if not race.complete() and not stop.reason:
        raise RunError(f"a search needs a candidate that can be scored, all failed. See {journal.folder / 'trials'}.")
    return race, stop.reason


def selection_rows(plan: SearchPlan) -> int:
    """How many examples a candidate answers."""
    from tune_sparse.data.splits import load_splits

    [task] = tasks_named(plan.run.cell.task)
    folder = Path(plan.run.data_dir) if plan.run.data_dir else None
    return len(load_splits(task, folder, plan.run.protocol).selection)


def _final_evaluation(
    plan: SearchPlan,
    ledger: Ledger,
    race: Race,
    journal: SearchJournal,
    folder: Path,
    workers: int,
    token: str,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Write and score on test rows the winner and the heuristic, beside the maximal and a plain LoRA of that size."""
    space, layers = plan.space, plan.shape.layers
    by_key = {configuration_key(s.ranks): s for s in journal.suggestions}
    front, winner = race.front(), by_key[race.winner()].ranks
    maximal = plan.parameters(space.maximal(layers))
    chosen = {"winner": winner, "heuristic": space.heuristic(layers)}
    _finish(plan, ledger, chosen, folder, workers)
    plain = plan.plain_run(plan.parameters(winner))
    stopped = _train(plain, ledger, plan.config.sweep, token, report)
    if stopped:
        raise RunError(f"a search must not be {stopped} before its end. Start it again: it goes on.")
    scored = {name: read_outcomes(folder / name / "examples.parquet") for name in chosen}
    for name, run in (("maximal", plan.run), ("plain", plain)):
        scored[name] = read_outcomes(ledger.run_folder(run.run_id) / "examples.parquet")
    sizes = {name: plan.parameters(ranks) for name, ranks in chosen.items()} | {"maximal": maximal}
    sizes["plain"] = plain.protocol.lora_rank * sum(sum(size) for size in plan.sizes.values())
    return {
        "front": [
            {
                "ranks": by_key[key].ranks,
                "parameters": plan.parameters(by_key[key].ranks),
                "parameters_fraction": plan.parameters(by_key[key].ranks) / maximal,
                "accuracy": race.correctness[key].accuracy,
            }
            for key in front
        ],
        "winner": winner,
        "test": {name: _on_test(outcomes, scored["maximal"], sizes[name]) for name, outcomes in scored.items()},
        "selection_examples": race.n,
        "candidates": len(race.correctness),
        "suggestions": len(journal.suggestions),
        "stopped_early": sum(s.state == "stopped" for s in journal.suggestions),
        "failed": sum(s.state == "failed" for s in journal.suggestions),
        "answered_fraction": sum(m.count for m in race.correctness.values()) / (race.n * len(race.correctness)),
        "super_adapter_run": plan.run.run_id,
        "plain_run": plain.run_id,
    }


def _on_test(outcomes: Sequence[Outcome], maximal: Sequence[Outcome], parameters: int) -> dict[str, Any]:
    """Accuracy on test rows, and its paired difference from the maximal's with a 95% interval."""
    mine, other = (
        Correctness(len(found)).adding((i, bool(o.correct)) for i, o in enumerate(found))
        for found in (outcomes, maximal)
    )
    difference, low, high = difference_interval(mine, other)
    return {
        "accuracy": mine.accuracy,
        "parameters": parameters,
        "difference_from_maximal": difference,
        "interval_95": [low, high],
    }


def _finish(plan: SearchPlan, ledger: Ledger, chosen: Mapping[str, Ranks], folder: Path, workers: int) -> None:
    """Let workers write, merge, validate and score slices in `folder/<name>`, unless that was done before."""
    from ray import tune

    from tune_sparse.search.trainable import CandidateTrainable
    from tune_sparse.sweep.scheduler import ResourceQueue

    left = {name: ranks for name, ranks in chosen.items() if not _is_finished(folder / name, ranks)}
    common = _common(plan.run, ledger, plan.config.sweep)
    trials = []
    for name, ranks in left.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        trials.append(common | {"ranks": ranks, "stages": [], "folder": str((folder / name).resolve())})
    if trials:
        fit_trials(CandidateTrainable, ResourceQueue({"slices": trials}, dict, capacity, workers), tune.Callback())
    for name, ranks in left.items():
        if not _is_finished(folder / name, ranks):
            raise RunError(f"a slice must pass its validation, the {name} in {folder} did not. See its report there.")


def _is_finished(folder: Path, ranks: Ranks) -> bool:
    done = folder / "result.json"
    return done.exists() and read_json(done)["ranks"] == ranks
