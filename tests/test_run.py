"""What is part of a run's identity, and of its accuracy before tuning."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from factories import make_cell, make_run

from tune_sparse.config import BudgetOptions, Protocol
from tune_sparse.config.protocol import SCORING
from tune_sparse.identity import NUMERICS_VERSION
from tune_sparse.ledger import run as run_module
from tune_sparse.ledger.run import Run

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
    before = make_run().identity, make_run().pruned_baseline_id
    monkeypatch.setattr(run_module, "NUMERICS_VERSION", NUMERICS_VERSION + 1)
    assert make_run().identity != before[0]
    assert make_run().pruned_baseline_id != before[1]


def test_the_identity_does_not_change_with_places_on_disk() -> None:
    moved = make_run(model_path="/elsewhere/tiny", data_dir="/data")
    assert moved.identity == make_run().identity
    assert moved.pruned_baseline_id == make_run().pruned_baseline_id


@pytest.mark.parametrize("name", OTHER_CELL)
def test_cells_of_one_seed_do_not_share_their_luck_but_modes_and_backends_do(name: str) -> None:
    other = make_run(make_cell(**{name: OTHER_CELL[name]}))
    assert (other.draw_seed == make_run().draw_seed) == (name in ("mode", "backend", "model"))
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


def test_every_field_of_a_run_is_in_its_identity_or_a_place() -> None:
    names = {f.name for f in fields(Run)}
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
