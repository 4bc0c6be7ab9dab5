"""The records of a training whose masks change: when, what they say, and that a resumed one says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, make_cell, make_run, tiny_run
from simulated_device import DEVICE, simulated_device
from torch import Tensor

from trainables.dynamics import Dynamics
from trainables.run_log import RunLog
from tune_sparse.config import ScheduleSettings
from tune_sparse.errors import RunError
from tune_sparse.ledger.dynamics import read_dynamics
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.masks import Masks, packed
from tune_sparse.schedules import Update

Q, FC = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
UPDATES = (Update(3, 0.5, 0.3), Update(7, 0.5, 0.2), Update(9, 0.5, 0.1))
STEPS = 20


def dynamics(lines: list[Any], updates: Sequence[Update] = UPDATES, schedule: str = "set", **settings: Any) -> Dynamics:
    run = make_run(make_cell(schedule=schedule, mode="masked-finetuning"))
    protocol, own = replace(run.protocol, steps=STEPS), ScheduleSettings(dynamics_every=5, **settings)
    run = replace(run, protocol=protocol, schedule_settings=own)
    return Dynamics(run, updates, 1000, lines.append)


def random_masks(seed: int, kept: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = {name: torch.randperm(32, generator=generator) for name in (Q, FC)}
    return {name: (places < kept).view(4, 8) for name, places in order.items()}


def weights_of(masks: Masks) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(4, 8, generator=generator) * mask for name, mask in masks.items()}
    for weight in weights.values():
        weight.grad = torch.randn(4, 8, generator=generator)
    return weights


def drive(tracker: Dynamics, steps: range) -> None:
    """Train without a model: new masks at each update."""
    for step in steps:
        update = next((update for update in UPDATES if update.step == step), None)
        before, after = (random_masks(sum(u.step <= last for u in UPDATES)) for last in (step - 1, step))
        if tracker.is_due(step):
            if step:
                tracker.see_gradients(weights_of(before), before)
            tracker.record(step, update, packed(after), weights_of(after))


def test_records_are_due_at_updates_every_so_many_steps_and_at_both_ends() -> None:
    assert [step for step in range(STEPS + 1) if dynamics([]).is_due(step)] == [0, 3, 5, 7, 9, 10, 15, 20]
    assert [step for step in range(STEPS + 1) if dynamics([], ()).is_due(step)] == [0, STEPS]


def test_a_record_counts_the_masks_that_it_is_given() -> None:
    lines: list[dict[str, Any]] = []
    drive(dynamics(lines), range(STEPS + 1))
    start, first = lines[0], lines[1]
    old, new = random_masks(0), random_masks(1)
    revived = sum(int((new[name] & ~old[name]).sum()) for name in new)
    stable = sum(int((~new[name] & ~old[name]).sum()) for name in new)
    assert start["pruning/target"] == start["sparsity/overall"] == 0.5
    assert start["weight_revival/revived"] == 0
    assert not any(name.startswith("zero_grad_norm") for name in start)
    assert (first["weight_revival/revived"], first["weight_revival/stable_zeros"]) == (revived, stable)
    assert first["weight_revival/rate"] == revived / (revived + stable)
    assert first["weight_revival/never_revived_share"] == 1.0
    assert first["zero_duration/mean"] == 3 * stable / 32
    assert first["sparsity/all_parameters"] == 32 / 1000
    assert first[f"layer_sparsity/{Q}"] == 0.5
    assert [line["weight_revival/revived"] for line in lines if not line["is_update"]] == [0] * 5
    assert lines[-1]["weight_revival/total"] == sum(line["weight_revival/revived"] for line in lines)
    assert lines[-1]["zero_duration/mean"] == pytest.approx(lines[4]["zero_duration/mean"] + STEPS - 9)
    gradients = {name: weight.grad for name, weight in weights_of(old).items()}
    norm = gradients[Q][~old[Q]].norm() / 16**0.5
    assert first[f"zero_grad_norm/{Q}"] == pytest.approx(norm.item())


def test_counts_from_masks_are_those_from_weights_but_for_kept_zeros() -> None:
    masks = random_masks(0)
    weights = weights_of(masks)
    weights[Q].view(-1)[masks[Q].flatten().nonzero()[0]] = 0.0
    line = dynamics([]).record(0, None, masks, weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert line["sparsity/overall"] * 64 == zeros - 1 == 32


@pytest.mark.parametrize("cut", [0, 4, 9, 12])
def test_a_resumed_training_writes_the_same_records(cut: int, tmp_path: Path) -> None:
    whole: list[dict[str, Any]] = []
    drive(dynamics(whole), range(STEPS + 1))
    killed = dynamics([])
    drive(killed, range(cut + 1))
    torch.save(killed.state(), tmp_path / "state.pt")
    lines: list[dict[str, Any]] = []
    resumed = dynamics(lines)
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    drive(resumed, range(cut + 1, STEPS + 1))
    assert lines == whole
    assert resumed.summary() == {name: whole[-1][name] for name in resumed.summary()}


def test_more_zeros_than_the_target_fail_the_run() -> None:
    tracker = dynamics([], schedule="gradual")
    tracker.record(0, None, random_masks(0, kept=32), {})
    tracker.record(3, Update(3, 0.25), random_masks(0, kept=23), {})  # 18 of 64 zeros: one a matrix is rounding
    with pytest.raises(RunError, match=r"0.5 of 64 weights, got 36 zeros after step 7"):
        tracker.record(7, Update(7, 0.5), random_masks(0, kept=14), {})


def test_masks_that_began_too_sparse_may_stay_so() -> None:
    tracker = dynamics([])
    tracker.record(0, None, random_masks(0, kept=14), {})
    assert tracker.record(3, UPDATES[0], random_masks(1, kept=14), {})["sparsity/overall"] == 36 / 64


@pytest.mark.parametrize(("rows", "health"), [(1, "good"), (2, "notice"), (3, "warning"), (4, "error")])
def test_health_is_named_by_dead_neurons(rows: int, health: str) -> None:
    masks = {name: torch.ones(5, 5, dtype=torch.bool) for name in (Q, FC)}
    for mask in masks.values():
        mask[:rows] = False
    line = dynamics([]).record(0, None, masks, {})
    assert line["dead_neurons/average.out"] == line[f"dead_neurons/{Q}.out"] == rows / 5
    assert (line["dead_neurons/average.in"], line["health"]) == (0, health)


def test_effective_ranks_are_recorded_where_asked_at_ends_and_updates() -> None:
    lines: list[dict[str, Any]] = []
    drive(dynamics(lines, effective_rank_side=8), range(STEPS + 1))
    assert [line["step"] for line in lines if "effective_rank/average" in line] == [0, 3, 7, 9, 20]
    assert lines[0]["entropy_rank/average"] == pytest.approx(
        (lines[0][f"entropy_rank/{Q}"] + lines[0][f"entropy_rank/{FC}"]) / 2
    )
    small: list[dict[str, Any]] = []
    drive(dynamics(small, effective_rank_side=7), range(STEPS + 1))
    assert not any("rank" in name for line in small for name in line)


def test_a_run_has_its_records_in_a_file_that_others_lack(tmp_path: Path) -> None:
    assert read_dynamics(tmp_path) == []
    log = RunLog(tmp_path)
    written: list[Any] = []
    tracker = dynamics(written)
    tracker._write = log.dynamics
    drive(tracker, range(4))
    log.close()
    assert [line["step"] for line in read_dynamics(tmp_path)] == [0, 3]


def test_between_records_nothing_is_asked_of_a_device_and_gradients_are_not_waited_for() -> None:
    with simulated_device() as activity:
        tracker, masks = dynamics([]), packed(random_masks(0)).to(DEVICE)
        weights = {name: torch.randn(4, 8).to(DEVICE) for name in masks}
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        tracker.record(0, None, masks, weights)
        asked = activity.waited, activity.launches.total()
        assert not any(tracker.is_due(step) for step in (1, 2, 4, 6, 8))
        assert (activity.waited, activity.launches.total()) == asked
        tracker.see_gradients(weights, masks)
        assert activity.waited == asked[0]
        assert activity.launches.total() > asked[1]


def test_a_record_on_a_device_says_the_same_and_takes_only_bits_from_it() -> None:
    lines: list[dict[str, Any]] = []
    here: list[dict[str, Any]] = []
    with simulated_device() as activity:
        for tracker, device in ((dynamics(here), "cpu"), (dynamics(lines), DEVICE)):
            for step, update, seed in ((0, None, 0), (3, UPDATES[0], 1)):
                masks = packed(random_masks(seed)).to(torch.device(device))
                before = activity.downloaded_bytes
                tracker.record(step, update, masks, {})
        assert activity.downloaded_bytes - before < 2 * 32 / 8 * len(masks) + 100
    assert lines == here


def scheduled(llama: Path, schedule: str, **settings: Any) -> Run:
    run = tiny_run(llama, mode="masked-finetuning", steps=8, eval_every=8)
    own = ScheduleSettings(dynamics_every=4, update_every=2, gradual_updates=3, **settings)
    return replace(run, cell=replace(run.cell, schedule=schedule), schedule_settings=own)


@pytest.mark.parametrize(
    ("schedule", "steps"), [("one-shot", [0, 8]), ("gradual", [0, 3, 4, 6, 8]), ("rigl", [0, 2, 4, 8])]
)
def test_a_run_whose_weights_are_trained_records_its_masks(
    schedule: str, steps: list[int], llama: Path, tmp_path: Path
) -> None:
    run, ledger = scheduled(llama, schedule), Ledger(tmp_path)
    record = finished(run, ledger)
    assert record.error is None
    lines = read_dynamics(ledger.run_folder(run.run_id))
    assert [line["step"] for line in lines] == steps
    assert all("zero_grad_norm/rms" in line for line in lines[1:])
    assert [line["pruning/target"] for line in lines] == sorted(line["pruning/target"] for line in lines)
    last, found = lines[-1], record.metrics["dynamics"]
    assert last["sparsity/overall"] == pytest.approx(record.metrics["actual_sparsity"], abs=1e-3)
    assert found == {name: last[name] for name in found}
    assert (found["weight_revival/total"] > 0) == (schedule == "rigl")
    assert lines[0]["sparsity/overall"] == (0 if schedule == "gradual" else last["sparsity/overall"])


def test_a_run_with_adapters_records_none(llama: Path, tmp_path: Path) -> None:
    run, ledger = tiny_run(llama), Ledger(tmp_path)
    assert "dynamics" not in finished(run, ledger).metrics
    assert read_dynamics(ledger.run_folder(run.run_id)) == []
