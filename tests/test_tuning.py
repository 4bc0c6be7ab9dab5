"""Searches over whole trainings: their spaces, what the sampler is told, and that a killed one goes on as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import TINY_PROTOCOL, done_record, failed_record, make_cell, make_run, write_run
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from analysis.read.load import cells_table
from tune_sparse.config import EarlyStopping, Protocol, SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.ledger.rungs import RungJournal
from tune_sparse.search.journal import Journal
from tune_sparse.search.tuning_config import TuneConfig
from tune_sparse.search.tuning_driver import run_tuning, sampler_of
from tune_sparse.search.tuning_plan import plan_tuning, prepare_tuning
from tune_sparse.search.tuning_result import best_of, result_lines
from tune_sparse.search.tuning_searcher import TrainingSearcher
from tune_sparse.search.tuning_space import Dimension, Point, space_from
from tune_sparse.search.tuning_trial import Trial
from tune_sparse.sweep.early_stopping import EarlyStopper
from tune_sparse.sweep.siblings import rivals_of
from tune_sparse.sweep.tune_parts import Stop

SPACE = {"learning_rate": "log:1e-4:1e-1", "method": "unstructured,random", "lora_rank": "4,8"}


def tune_config(objectives: tuple[str, ...] = ("loss",), space: dict[str, Any] = SPACE, **changes: Any) -> TuneConfig:
    own = {name: changes.pop(name) for name in ("sampler", "trials") if name in changes}
    names = {"models": "tiny-llama", "tasks": "boolq", "methods": "unstructured", "sparsities": 0.5}
    names |= {"modes": "sparse-to-dense", "learning_rate": 1e-2, "final_learning_rate": 1e-3, "steps": 100}
    return TuneConfig(SweepConfig.from_names(names | changes), space_from(space), **own, objectives=objectives)


def test_a_space_is_read_as_it_is_written() -> None:
    space = {"learning_rate": "log:1e-5:1e-2", "steps": "100:400", "sparsity": "0.3,0.5", "mode": ["dense", "x"]}
    assert space_from(space) == (
        Dimension("learning_rate", (), 1e-5, 1e-2, True),
        Dimension("steps", (), 100, 400),
        Dimension("sparsity", (0.3, 0.5)),
        Dimension("mode", ("dense", "x")),
    )


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        ({}, "at least one setting"),
        ({"learning": "1,2"}, "Did you mean 'learning_rate'"),
        ({"n_test": "10,20"}, "n_test cannot be searched: it changes how models are scored"),
        ({"lora_rank": "8"}, "two different values"),
        ({"lora_rank": "8,8"}, "two different values"),
        ({"lora_rank": "8:x"}, "lora_rank"),
        ({"lora_rank": "16:8"}, "rises"),
        ({"lora_rank": "1:2:3"}, "two ends"),
        ({"weight_decay": "log:0:1"}, "above 0"),
        ({"packing": "false:true"}, "of numbers"),
    ],
)
def test_a_bad_space_is_refused_with_the_reason(space: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        space_from(space)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tasks": "boolq gsm8k"}, "tasks must name one value"),
        ({"sparsities": "0.3 0.5"}, "search it with --space"),
        ({"axes": {"weight_decay": "0,0.1"}}, "has no axes"),
        ({"objectives": ("sparsity",)}, "objectives are loss"),
        ({"objectives": ("loss", "accuracy")}, "accuracy"),
        ({"sampler": "cma"}, "cma"),
        ({"trials": 0}, "at least 1"),
    ],
)
def test_a_bad_search_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        tune_config(**changes)


def test_a_point_is_the_sweep_of_these_settings() -> None:
    config = tune_config()
    found = config.sweep_at({"learning_rate": 2e-2, "method": "random", "lora_rank": 8})
    assert (found.methods, found.protocol.lora_rank) == (("random",), 8)
    assert found.protocol.final_learning_rate == pytest.approx(2e-3)  # it keeps its share
    assert len(config.corners().points) == 4
    with pytest.raises(InputError, match="warm-up"):
        config.sweep_at({"warmup_steps": 100})


def test_corners_are_checked_before_anything_trains(llama: Path) -> None:
    base = {"models": str(llama), "data_dir": "synthetic", "n_train": 16, "n_selection": 4, "n_test": 8}
    assert len(plan_tuning(tune_config(**base)).corners.runs) == 8
    with pytest.raises(InputError, match="warm-up"):
        plan_tuning(tune_config(space={"steps": "4:8"}, warmup_steps=4, **base))
    with pytest.raises(InputError, match="different steps"):
        plan_tuning(tune_config(space={"steps": "3:8"}, warmup_steps=0, stop_early="loss", **base))


def test_the_best_is_chosen_by_what_no_test_example_changes() -> None:
    values = {0: {"loss": 1.0, "sparsity": 0.5}, 1: {"loss": 0.9, "sparsity": 0.3}, 2: {"loss": 1.0, "sparsity": 0.3}}
    values |= {3: {"loss": 0.9, "sparsity": 0.3}}
    assert best_of(values, ("loss",)) == [1]
    assert best_of(values, ("loss", "sparsity")) == [1, 0]
    assert best_of({}, ("loss",)) == []


def test_models_before_their_last_mask_compete_among_themselves() -> None:
    runs = [make_run(make_cell(**c)) for c in ({}, {"method": "wanda"}, {"mode": "dense"}, {"sparsity": 0.7})]
    first, same, other_mode, other_sparsity = runs
    assert rivals_of(first, False) == rivals_of(same, False) == rivals_of(other_sparsity, False)
    assert rivals_of(first, True) == rivals_of(same, True) != rivals_of(other_sparsity, True)
    assert rivals_of(first, False) != rivals_of(other_mode, False)


class Rehearsal:
    """A search in a folder, and workers that answer at once: the loss is least at a learning rate of 1e-2."""

    def __init__(self, folder: Path, config: TuneConfig, lost: Callable[[int], bool] = lambda number: False) -> None:
        self.ledger, self.journal = Ledger(folder), Journal(folder / "tunings" / "t", Trial)
        self.runs: dict[str, Run] = {}
        for trial in self.journal.suggestions:
            with suppress(InputError):
                self.run_at(trial.point)
        self.stopper = None
        if config.sweep.early_stopping.stop_early:
            self.stopper = EarlyStopper(config.sweep.early_stopping, self.runs, RungJournal(folder))
        self._lost, self._count, self.trained = lost, 0, list[str]()
        self.search = TrainingSearcher(
            sampler_of(config),
            self.journal,
            config.objectives,
            self.run_at,
            self.runs,
            self.ledger,
            self.stopper,
            lambda run: {"run_id": run.run_id},
            config.trials,
            Stop(),
        )

    def run_at(self, point: Point) -> Run:
        if point["learning_rate"] > 0.05:
            raise InputError("too fast")
        protocol = Protocol(steps=100, learning_rate=point["learning_rate"], lora_rank=point["lora_rank"])
        run = make_run(make_cell(method=point["method"]), protocol=protocol)
        self.runs[run.run_id] = run
        return run

    def play(self, trials: int = 1000) -> Rehearsal:
        """Run trials one after the other until the search or their number ends."""
        while self._count < trials and (found := self.search.suggest(str(self._count))) != Searcher.FINISHED:
            self._play(str(self._count), self.runs[found["trial"]["run_id"]])
            self._count += 1
        return self

    def _play(self, trial_id: str, run: Run) -> None:
        rate = run.protocol.learning_rate
        loss = abs(rate - 1e-2) * 10 + (run.cell.method == "random")
        self.trained.append(run.run_id)
        if self._lost(self._count):
            self.search.on_trial_complete(trial_id, None, error=True)
            self.search.requeue(run)
            return
        if self.stopper is not None:
            rungs = [(step, loss) for step in self.stopper.settings(run)["rungs"]["steps"]]
            for rung in rungs:
                told = {"run_id": run.run_id, "rungs": [rung]}
                if self.stopper.on_trial_result(None, SimpleNamespace(), told) == TrialScheduler.STOP:
                    self.search.on_trial_complete(trial_id, told)
                    return
        fails = run.protocol.lora_rank == 4 and run.cell.method == "random"
        record = failed_record(run) if fails else done_record(run, eval_loss=loss, actual_sparsity=0.5)
        write_run(self.ledger, run, record)
        self.search.on_trial_complete(trial_id, {"run_id": run.run_id})

    @property
    def told(self) -> list[Trial]:
        return self.journal.suggestions


@pytest.mark.parametrize("stop_early", [None, "loss"])
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_killed_search_goes_on_as_an_undisturbed_one(sampler: str, stop_early: str | None, tmp_path: Path) -> None:
    config = tune_config(sampler=sampler, trials=24, stop_early=stop_early, steps=90)
    for folder in ("undisturbed", "killed"):
        (tmp_path / folder).mkdir()
    undisturbed = Rehearsal(tmp_path / "undisturbed", config).play()
    first = Rehearsal(tmp_path / "killed", config).play(7)
    first.search.suggest("killed as it began")
    second = Rehearsal(tmp_path / "killed", config).play(5)
    third = Rehearsal(tmp_path / "killed", config).play()
    assert third.told == undisturbed.told
    trained = first.trained + second.trained + third.trained
    assert len(set(trained)) == len(trained) == len(undisturbed.trained)
    states = {trial.state for trial in undisturbed.told}
    assert states == {"done", "failed"} | ({"stopped"} if stop_early else set())
    assert any(trial.error == "too fast" and trial.run_id is None for trial in undisturbed.told)


def test_a_search_takes_what_the_ledger_has(tmp_path: Path) -> None:
    config = tune_config(sampler="random", trials=12)
    first = Rehearsal(tmp_path, config).play()
    other = Rehearsal(tmp_path, replace(config, objectives=("loss", "sparsity")))
    other.journal.suggestions.clear()
    again = other.play()
    assert len(first.trained) > 5
    assert not again.trained
    assert {trial.values["sparsity"] for trial in again.told if trial.values} == {0.5}


def test_a_lost_worker_costs_a_trial_more(tmp_path: Path) -> None:
    config = tune_config(sampler="random", trials=6)
    search = Rehearsal(tmp_path, config, lost=lambda number: number == 1).play()
    twice = [run_id for run_id in search.trained if search.trained.count(run_id) == 2]
    assert len(set(twice)) == 1
    assert all(trial.state in ("done", "failed") for trial in search.told)


def test_two_objectives_leave_out_what_was_stopped(tmp_path: Path) -> None:
    stopping = {"stop_early": "loss", "steps": 90}
    config = tune_config(("loss", "sparsity"), sampler="nsga2", trials=30, **stopping)
    search = Rehearsal(tmp_path, config).play()
    assert {trial.state for trial in search.told} == {"done", "failed", "stopped"}
    assert all(trial.values is None for trial in search.told if trial.state != "done")


@pytest.mark.slow
@pytest.mark.xdist_group("machine")
def test_a_search_through_ray_and_optuna(llama: Path, tmp_path: Path) -> None:
    sweep = SweepConfig(
        models=(str(llama),),
        tasks=("boolq",),
        methods=("unstructured",),
        sparsities=(0.5,),
        modes=("sparse-to-sparse",),
        protocol=replace(TINY_PROTOCOL, steps=8),
        data_dir=Path("synthetic"),
        results_dir=tmp_path,
        workers=1,
        early_stopping=EarlyStopping(stop_early="loss", rungs=(0.25, 0.5), reduction=2),
    )
    space = space_from({"learning_rate": "log:1e-6:3e-2", "sparsity": "0.3,0.5"})
    config = TuneConfig(sweep, space, sampler="random", trials=4)
    found = run_tuning(prepare_tuning(replace(config, trials=2)))
    assert found["trials"][0]["state"] == "done"
    more = run_tuning(prepare_tuning(config))
    assert more["trials"][:2] == found["trials"]
    assert {trial["state"] for trial in more["trials"]} == {"done", "stopped"}
    [best] = more["best"]
    losses = {t["number"]: t["values"]["loss"] for t in more["trials"] if t["values"]}
    assert best == min(losses, key=losses.__getitem__)
    assert list(more["test"]) == [str(best)]
    assert result_lines(more)[1].startswith(f"*   {best}  loss")
    assert cells_table([tmp_path]).empty  # no report claims anything of cells that results chose
