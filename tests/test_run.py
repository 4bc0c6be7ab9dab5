"""What is part of a run's identity, and of its accuracy before tuning."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from factories import make_cell, make_run

from tune_sparse.config import BudgetOptions, Protocol, ScheduleSettings
from tune_sparse.config.protocol import SCORING
from tune_sparse.identity import NUMERICS_VERSION
from tune_sparse.ledger import run as run_module
from tune_sparse.ledger.run import Run, read_config, write_config
from tune_sparse.schedules import SCHEDULES

OTHER_PROTOCOL: dict[str, Any] = {
    "steps": 100,
    "global_batch_size": 128,
    "learning_rate": 1e-3,
    "final_learning_rate": 0.0,
    "warmup_fraction": 0.1,
    "warmup_steps": 6,
    "weight_decay": 0.0,
    "beta1": 0.8,
    "beta2": 0.99,
    "max_grad_norm": 2.0,
    "train_also": ("bias",),
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "masked_lora_impl": "effective-weight",
    "train_on_prompt": True,
    "packing": True,
    "precision": "float32",
    "max_tokens": 1024,
    "max_new_tokens": 128,
    "num_fewshot": 2,
    "n_train": 100,
    "n_selection": None,
    "n_test": 100,
    "eval_every": 25,
    "threads": 2,
}
OTHER_CALIBRATION: dict[str, Any] = {
    "calibration": "wikitext2",
    "calibration_tokens": 4096,
    "calibration_window": 512,
    "calibration_order": "sequential",
}
OTHER_CELL: dict[str, Any] = {
    "model": "other",
    "task": "gsm8k",
    "method": "random",
    "sparsity": 0.6,
    "mode": "sparse-to-sparse",
    "seed": 1,
    "backend": "cerebras",
    "schedule": "rigl",
}
OTHER_SCHEDULE: dict[str, Any] = {
    "update_from": 0.1,
    "update_to": 0.5,
    "gradual_updates": 5,
    "gradual_curve": "cubic",
    "revivable": True,
    "update_every": 10,
    "drop_fraction": 0.1,
    "drop_curve": "constant",
    "levels": (0.2, 0.4),
    "steps_per_level": 7,
    "rescore": False,
    "restart_learning_rate": False,
    "dynamics_every": 10,
    "effective_rank_side": 8192,
}
OTHER_INPUT: dict[str, Any] = {"model_fingerprint": "x", "data_fingerprint": "x", "prompt_version": "2"}


def test_every_field_of_the_protocol_is_varied() -> None:
    assert {f.name for f in fields(Protocol)} == OTHER_PROTOCOL.keys() | OTHER_CALIBRATION.keys() | {"recover"}


@pytest.mark.parametrize("name", OTHER_CALIBRATION)
def test_calibration_is_part_of_calibrated_runs_alone(name: str) -> None:
    other = replace(Protocol(), **{name: OTHER_CALIBRATION[name]})
    for method, matters in (("unstructured", False), ("random", False), ("wanda", True), ("magnitude-owl", True)):
        before, after = (make_run(make_cell(method=method), protocol=protocol) for protocol in (Protocol(), other))
        assert (before.identity != after.identity) == matters
        assert (before.pruned_baseline_id != after.pruned_baseline_id) == matters


def test_recovery_makes_every_pruned_run_a_calibrated_one() -> None:
    recovered = replace(Protocol(), recover="reconstruct")
    for method in ("unstructured", "wanda"):
        before, after = (make_run(make_cell(method=method), protocol=protocol) for protocol in (Protocol(), recovered))
        assert before.identity != after.identity
        assert before.pruned_baseline_id != after.pruned_baseline_id
        assert after.is_calibrated
        assert after.updates_weights
        assert after.pruning_id not in (None, before.pruning_id)
        other = replace(after, protocol=replace(recovered, calibration_tokens=4096))
        assert other.pruning_id != after.pruning_id
    dense = make_cell(method="none", sparsity=0.0, mode="dense")
    assert make_run(dense).identity == make_run(dense, protocol=recovered).identity
    assert make_run(dense, protocol=recovered).pruning_id is None


def test_a_calibration_text_is_part_of_calibrated_runs_alone() -> None:
    for method, matters in (("structured", False), ("sparsegpt", True)):
        before, after = (make_run(make_cell(method=method), calibration_fingerprint=f) for f in (None, "x" * 64))
        assert (before.identity != after.identity) == matters
        assert (before.pruned_baseline_id != after.pruned_baseline_id) == matters


def test_a_run_recorded_before_there_was_calibration_is_still_read() -> None:
    config = make_run().as_config()
    del config["calibration_fingerprint"]
    config["protocol"] = {k: v for k, v in config["protocol"].items() if k not in OTHER_CALIBRATION}
    assert Run.from_config(config) == make_run()


@pytest.mark.parametrize("name", OTHER_PROTOCOL)
def test_the_identity_changes_with_every_field_of_the_protocol(name: str) -> None:
    changed = make_run(protocol=replace(Protocol(), **{name: OTHER_PROTOCOL[name]}))
    assert changed.identity != make_run().identity
    assert changed.run_id != make_run().run_id


@pytest.mark.parametrize("name", OTHER_CELL)
def test_the_identity_changes_with_every_field_of_the_cell(name: str) -> None:
    assert make_run(make_cell(**{name: OTHER_CELL[name]})).identity != make_run().identity


@pytest.mark.parametrize("name", OTHER_INPUT)
def test_the_identity_changes_with_the_model_the_data_and_the_prompt(name: str) -> None:
    assert make_run(**{name: OTHER_INPUT[name]}).identity != make_run().identity


def test_the_identity_changes_with_the_numerics_version(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    before = run.identity, run.pruned_baseline_id
    monkeypatch.setattr(run_module, "NUMERICS_VERSION", NUMERICS_VERSION + 1)
    assert run.identity != before[0]
    assert run.pruned_baseline_id != before[1]


def test_the_identity_does_not_change_with_places_on_disk() -> None:
    moved = make_run(model_path="/elsewhere/tiny", data_dir="/data")
    assert moved.identity == make_run().identity
    assert moved.pruned_baseline_id == make_run().pruned_baseline_id


@pytest.mark.parametrize("name", OTHER_CELL)
def test_cells_of_one_seed_do_not_share_their_luck_but_modes_and_backends_do(name: str) -> None:
    other = make_run(make_cell(**{name: OTHER_CELL[name]}))
    assert (other.draw_seed == make_run().draw_seed) == (name in ("mode", "backend", "model", "schedule"))
    assert 0 <= other.draw_seed < 2**32


def test_what_a_training_draws_is_of_its_weights_and_no_path_or_setting() -> None:
    moved = make_run(make_cell(model="renamed"), model_path="/elsewhere/tiny", protocol=Protocol(learning_rate=1e-3))
    assert moved.draw_seed == make_run().draw_seed
    assert make_run(model_fingerprint="x").draw_seed != make_run().draw_seed


OTHER_BUDGETS = BudgetOptions(4096, 1024, 1024, "always")


def test_budgets_are_no_part_of_the_identity() -> None:
    run = make_run()
    other = replace(run, budgets=OTHER_BUDGETS)
    assert (other.identity, other.pruned_baseline_id) == (run.identity, run.pruned_baseline_id)
    assert Run.from_config(other.as_config()) == other


def test_with_dropout_the_micro_batch_is_part_of_the_identity() -> None:
    run = make_run(protocol=replace(Protocol(), lora_dropout=0.1))
    other, same = (replace(run, budgets=BudgetOptions(n, 1024, 1024, "always")) for n in (4096, 2048))
    assert len({run.identity, other.identity}) == 2
    assert same.identity == run.identity, "the default is 2048 on every device"
    assert other.pruned_baseline_id == run.pruned_baseline_id


def test_runs_of_the_lora_modes_keep_the_identity_that_their_records_have() -> None:
    """Hashes of NUMERICS_VERSION 4, computed before there were schedules."""
    assert make_run().identity == "abbacc5641c58d3bc58a6957d28cf0802bcee0421a9f61f0548ac936e2b485f5"
    wanda = make_run(make_cell(mode="sparse-to-sparse", method="wanda"))
    assert wanda.identity == "ad2a10ee6dc896ef50d9044e21c9e08b798e3cdcf5f4524b9d6ac1974911dad3"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_settings_of_its_schedule_are_part_of_a_runs_identity_and_no_others(schedule: str) -> None:
    assert {f.name for f in fields(ScheduleSettings)} == OTHER_SCHEDULE.keys()
    run = make_run(make_cell(mode="masked-finetuning", schedule=schedule))
    for name, value in OTHER_SCHEDULE.items():
        other = replace(run, schedule_settings=replace(ScheduleSettings(), **{name: value}))
        assert (other.identity != run.identity) == (name in SCHEDULES[schedule].settings), name
        assert other.pruned_baseline_id == run.pruned_baseline_id


def test_the_accuracy_before_tuning_is_the_dense_models_where_a_training_begins_with_every_weight() -> None:
    dense = make_run(make_cell(method="none", sparsity=0.0))
    before = {
        name: make_run(make_cell(method="wanda", mode="masked-finetuning", schedule=name)).pruned_baseline_id
        for name in ("one-shot", "gradual", "set", "rigl")
    }
    assert before["gradual"] == dense.pruned_baseline_id
    assert before["one-shot"] == before["set"] == before["rigl"] != before["gradual"]


def test_a_setting_left_to_its_schedule_is_the_same_as_one_given_so() -> None:
    run = make_run(make_cell(mode="masked-finetuning", schedule="gradual"))
    given = replace(run, schedule_settings=ScheduleSettings(update_from=0.15, update_to=0.85))
    assert given.identity == run.identity


def test_settings_of_a_schedule_are_read_back_from_a_run_folder(tmp_path: Path) -> None:
    run = make_run(make_cell(schedule="iterative"), schedule_settings=ScheduleSettings(**OTHER_SCHEDULE))
    write_config(tmp_path, run)
    assert read_config(tmp_path) == run


def test_a_run_recorded_before_there_were_schedules_is_still_read() -> None:
    config = make_run().as_config()
    del config["schedule_settings"], config["cell"]["schedule"]
    assert Run.from_config(config) == make_run()


def test_a_schedule_is_in_the_name_of_its_run() -> None:
    run = make_run(make_cell(mode="masked-finetuning", schedule="set"))
    assert run.run_id == f"torch_tiny_boolq_unstructured_s50_masked-finetuning-set_{run.identity[:8]}"


def test_every_field_of_a_run_is_in_its_identity_or_a_place() -> None:
    names = {f.name for f in fields(Run)} - {"schedule_settings"}
    left_out_where_none = {"calibration_fingerprint", "cerebras", "super_adapter"}
    assert names == {"cell", "protocol", "model_path", "data_dir", "budgets", *left_out_where_none, *OTHER_INPUT}


def test_what_trained_on_cerebras_is_in_the_identity_but_not_in_the_accuracy_before_tuning() -> None:
    run = make_run(cerebras={"target": "cpu", "release": "2.10.0"})
    assert run.identity != make_run().identity
    assert run.pruned_baseline_id == make_run().pruned_baseline_id


@pytest.mark.parametrize(
    ("changes", "readable"),
    [
        ({}, "torch_tiny_boolq_unstructured_s50_sparse-to-dense_"),
        ({"sparsity": 0.05}, "torch_tiny_boolq_unstructured_s05_sparse-to-dense_"),
        ({"sparsity": 0.375}, "torch_tiny_boolq_unstructured_s37.5_sparse-to-dense_"),
        ({"model": "my model:v1"}, "torch_my-model-v1_boolq_unstructured_s50_sparse-to-dense_"),
    ],
)
def test_the_run_id_can_be_read_by_people(changes: dict[str, Any], readable: str) -> None:
    run = make_run(make_cell(**changes))
    assert run.run_id == readable + run.identity[:8]


def test_the_accuracy_before_tuning_is_shared_by_the_modes() -> None:
    both = {make_run(make_cell(mode=mode)).pruned_baseline_id for mode in ("sparse-to-dense", "sparse-to-sparse")}
    assert len(both) == 1


@pytest.mark.parametrize("name", sorted(OTHER_PROTOCOL.keys() - {*SCORING}))
def test_the_accuracy_before_tuning_is_shared_by_training_settings(name: str) -> None:
    changed = make_run(protocol=replace(Protocol(), **{name: OTHER_PROTOCOL[name]}))
    assert changed.pruned_baseline_id == make_run().pruned_baseline_id


@pytest.mark.parametrize("name", SCORING)
def test_the_accuracy_before_tuning_differs_by_the_settings_of_the_test(name: str) -> None:
    changed = make_run(protocol=replace(Protocol(), **{name: OTHER_PROTOCOL[name]}))
    assert changed.pruned_baseline_id != make_run().pruned_baseline_id


@pytest.mark.parametrize("name", ["model", "task", "method", "sparsity", "backend"])
def test_the_accuracy_before_tuning_differs_by_what_is_pruned(name: str) -> None:
    assert make_run(make_cell(**{name: OTHER_CELL[name]})).pruned_baseline_id != make_run().pruned_baseline_id


@pytest.mark.parametrize("name", OTHER_INPUT)
def test_the_accuracy_before_tuning_differs_by_its_inputs(name: str) -> None:
    assert make_run(**{name: OTHER_INPUT[name]}).pruned_baseline_id != make_run().pruned_baseline_id


@pytest.mark.parametrize(
    ("method", "ids"), [("unstructured", 1), ("structured", 1), ("random", 2), ("random-2:4", 2), ("wanda", 1)]
)
def test_the_accuracy_before_tuning_differs_by_seed_only_for_random_masks(method: str, ids: int) -> None:
    assert len({make_run(make_cell(method=method, seed=seed)).pruned_baseline_id for seed in (0, 1)}) == ids
