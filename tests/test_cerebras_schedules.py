"""Schedules on Cerebras: what its algorithms are told, and that they do with it what trainings here do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, make_run, tiny_run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cerebras_modelzoo import LOSS_TOLERANCE, lose_after, losses, run_there

from trainables.cerebras_backend import CerebrasTraining
from trainables.mask_schedule import MaskSchedule
from trainables.masked_steps import CurrentMasks, MaskedSteps
from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.cerebras.environment import SiteEnvironment
from tune_sparse.cerebras.job import CHILD
from tune_sparse.cerebras.sparsity import ChangingMasks, sparsity_section
from tune_sparse.config import Cell, Cerebras, ScheduleSettings
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.mask_io import read_bits
from tune_sparse.pruning.mask_updates import cut, regrow
from tune_sparse.schedules import SCHEDULES

SETTINGS = {
    "gradual": ScheduleSettings(gradual_updates=5),
    "set": ScheduleSettings(update_every=3),
    "rigl": ScheduleSettings(update_every=3),
    "iterative": ScheduleSettings(levels=(0.3, 0.5)),
}
CHANGING = [name for name, facts in SCHEDULES.items() if facts.planner]


def scheduled_run(folder: Path, schedule: str, **changes: Any) -> Run:
    names = {"mode": "masked-finetuning", "schedule": schedule, "steps": 20, "learning_rate": 1e-3}
    return replace(tiny_run(folder, **{**names, **changes}), schedule_settings=SETTINGS[schedule])


def planned_run(schedule: str, method: str = "unstructured", **settings: Any) -> Run:
    cell = Cell("model", "boolq", method, 0.7, "masked-finetuning", 0, "cerebras", schedule)
    return replace(make_run(cell), schedule_settings=ScheduleSettings(**settings))


SECTIONS: dict[str, dict[str, Any]] = {
    "one-shot": {"algorithm": "static", "init_method": "from_zeros", "sparsity": 0.75},
    "gradual": {
        "algorithm": "gmp",
        "sparsity": {"type": "cycling", "values": [0.1875, 0.375, 0.5625, 0.75]},
        "update": {"steps": [1300, 2000, 2700, 3400]},
    },
    "set": {
        "algorithm": "set",
        "init_method": "from_zeros",
        "sparsity": 0.75,
        "drop_fraction": {"type": "cosine", "init": 0.3, "half_period": 3000},
        "update": {"freq": 100, "start": 0, "stop": 3000},
    },
}
SECTIONS["rigl"] = SECTIONS["set"] | {"algorithm": "rigl"}
SECTIONS["iterative"] = SECTIONS["one-shot"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_section_of_each_schedule_by_hand(schedule: str) -> None:
    settings = ScheduleSettings(gradual_updates=4)
    section = sparsity_section(SCHEDULES[schedule], settings, 0.75, 4000, ["b.weight", "a.weight"])
    assert section == SECTIONS[schedule] | {"param_filter": ["model.a.weight", "model.b.weight"]}


@given(
    start=st.floats(0, 0.5),
    stop=st.floats(0.5, 1),
    every=st.integers(1, 30),
    steps=st.integers(1, 300),
    part=st.floats(0.1, 0.9),
)
def test_a_frequency_there_is_the_steps_here(start: float, stop: float, every: int, steps: int, part: float) -> None:
    """By the formula of cstorch.sparse.utils.FreqSchedule, over the steps after which it is asked: from 1 on."""
    settings = ScheduleSettings(update_from=start, update_to=stop, update_every=every, drop_fraction=part)
    update = sparsity_section(SCHEDULES["rigl"], settings, 0.5, steps).get("update")
    planned = [update.step for update in SCHEDULES["rigl"].plan(settings, 0.5, steps)]
    if update is None:
        assert not planned
        return
    first, freq, last = update["start"], update["freq"], update["stop"]
    assert planned == [n for n in range(1, steps + 1) if (n - first) % freq == 0 and first <= n < last]


SHAPES = {"a": (8, 10), "b": (3, 7), "c": (40, 5)}


@pytest.mark.parametrize("method", ["unstructured", "magnitude-erk"])
def test_gradual_counts_end_with_those_of_one_shot(method: str) -> None:
    changing = ChangingMasks.from_run(planned_run("gradual", method))
    assert changing is not None
    counts = changing.counts(SHAPES, {name: math.prod(shape) for name, shape in SHAPES.items()})
    assert counts["survivors"] == counts["kept"]
    total = sum(map(math.prod, SHAPES.values()))
    assert sum(kept[-1] for kept in counts["kept"].values()) == pytest.approx(0.3 * total, abs=1.5)
    assert all(kept == sorted(kept, reverse=True) for kept in counts["kept"].values())
    if method == "unstructured":
        assert [kept[-1] for kept in counts["kept"].values()] == [24, 6, 60]


def test_growing_keeps_what_a_matrix_has_and_leaves_one_without_zeros_alone() -> None:
    changing = ChangingMasks.from_run(planned_run("rigl", "magnitude-global", update_every=60))
    assert changing is not None
    counts = changing.counts(SHAPES, {"a": 11, "b": 21, "c": 50})
    fractions = [update.drop_fraction for update in changing.updates]
    assert counts["kept"] == {"a": [11] * 2, "b": [21] * 2, "c": [50] * 2}
    assert counts["survivors"]["b"] == [21, 21]
    assert counts["survivors"]["c"] == [50 - round(50 * part) for part in fractions]


@pytest.mark.parametrize("schedule", ["one-shot", "iterative"])
def test_masks_that_stay_in_a_training_change_nothing_of_its_graph(schedule: str) -> None:
    assert ChangingMasks.from_run(planned_run(schedule)) is None


@pytest.mark.parametrize("schedule", CHANGING)
def test_masks_that_it_ends_with_are_kept_here(llama: Path, site: Path, schedule: str, tmp_path: Path) -> None:
    """With a stand-in that keeps the first weights of each matrix, as many as it was told."""
    ledger, on_cpu = Ledger(tmp_path), {"target": "cpu", "release": "2.10.0"}
    run = replace(scheduled_run(llama, schedule, backend="cerebras"), cerebras=on_cpu)
    record = finished(run, ledger)
    assert record.status == "done", record.error
    folder = ledger.run_folder(run.run_id)
    assert record.metrics["actual_sparsity"] == pytest.approx(0.5, abs=1e-3)
    masks = read_bits(folder / "masks.safetensors", torch.device("cpu"))
    counted = json.loads((folder / "sparse_config.json").read_text())["kept_by_matrix"]
    assert masks.kept == {name: kept for name, (kept, _) in counted.items()}
    assert "no dynamics are recorded" in (folder / "train.log").read_text()
    assert not list((ledger.folder / "cerebras" / run.run_id).glob("trained*"))


SCHEDULES_THERE = """
import json, sys, torch
from cerebras.pytorch.sparse.utils import make_hyperparam_schedule, make_update_schedule
found = []
for section, steps in json.loads(sys.argv[1]):
    is_update = make_update_schedule(section["update"])
    sparsity = make_hyperparam_schedule(section["sparsity"])
    drop = make_hyperparam_schedule(section.get("drop_fraction", 0.0))
    for step in range(1, steps + 1):
        now = torch.tensor(step)
        updates = is_update(now)
        if updates:
            kept = ((1 - sparsity(now)) * torch.tensor(1000.0)).int().item()
            found.append([step, kept, drop(now).item()])
        sparsity.update(updates)
        sparsity.cache_clear()
    found.append(None)
print(json.dumps(found))
"""


@pytest.mark.cerebras
def test_sections_mean_there_what_was_planned(environment: SiteEnvironment) -> None:
    """Steps and fractions; what stays of 1,000 weights is ours, or one less, as there it is rounded down."""
    settings = [ScheduleSettings(gradual_curve=curve) for curve in ("linear", "cubic", "exponential")]
    settings += [
        ScheduleSettings(update_every=7, drop_curve=curve, update_from=f)
        for curve in ("cosine", "constant")
        for f in (0.0, 0.1)
    ]
    asked = [(name, own, steps) for name in CHANGING for own in settings for steps in (40, 333)]
    asked = [(name, own, steps) for name, own, steps in asked if SCHEDULES[name].plan(own, 0.65, steps)]
    sections = [(sparsity_section(SCHEDULES[name], own, 0.65, steps), steps) for name, own, steps in asked]
    found = json.loads(run_there(environment, SCHEDULES_THERE, json.dumps(sections)))
    for name, own, steps in asked:
        for update in SCHEDULES[name].plan(own, 0.65, steps):
            step, kept, drop = found.pop(0)
            assert step == update.step
            assert kept in (round(1000 * (1 - update.sparsity)), round(1000 * (1 - update.sparsity)) - 1)
            assert drop == pytest.approx(update.drop_fraction, abs=1e-6)
        assert found.pop(0) is None


UPDATES_THERE = """
import sys, torch
from cerebras.pytorch.sparse.utils import *
from safetensors.torch import load_file, save_file
given, found = load_file(sys.argv[1]), {}
for case in range(sum(name.startswith("weight") for name in given)):
    weight, keep, gradient = (given["%s%d" % (kind, case)] for kind in ("weight", "keep", "gradient"))
    pruned, dropped = given["counts%d" % case].tolist()
    size, kept = float(weight.numel()), float(keep.sum())
    score = weight.abs() * keep
    found["cut%d" % case] = make_mask_topk_sparsity(score, torch.tensor((pruned - 0.5) / size))
    survivors, count = make_mask_drop_minimum(score, keep, torch.tensor((dropped - 0.5) / kept))
    sparsity = torch.tensor((size - kept - 0.5) / size)
    found["grown%d" % case] = make_mask_grow_maximum(gradient.abs(), survivors, sparsity, count)
save_file(found, sys.argv[2])
"""


@pytest.mark.cerebras
def test_cut_and_regrow_are_those_of_cstorch_on_the_same_weights(environment: SiteEnvironment, tmp_path: Path) -> None:
    """Its own functions, with fractions that make its counts ours: no scores tie."""
    given: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for case in range(40):
        generator = torch.Generator().manual_seed(case)
        shape = (5 + case, 40 - case // 2)
        weight, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        keep = torch.rand(shape, generator=generator) < 0.3 + case / 100
        kept = int(keep.sum())
        dropped, pruned = max(1, kept // 4), keep.numel() - kept // 2
        given |= {f"weight{case}": weight, f"keep{case}": keep, f"gradient{case}": gradient}
        given[f"counts{case}"] = torch.tensor([pruned, dropped])
        expected[f"cut{case}"] = cut(weight, keep, kept, pruned).keep
        expected[f"grown{case}"] = regrow(weight, keep, kept, dropped, gradient).keep
    save_file(given, tmp_path / "given.safetensors")
    run_there(environment, UPDATES_THERE, tmp_path / "given.safetensors", tmp_path / "found.safetensors")
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


TRAINING_THERE = """
import json, sys, torch, cerebras.pytorch as cstorch
from safetensors.torch import load_file, save_file
backend = cstorch.backend("CPU", artifact_dir=sys.argv[2] + "/artifacts")
sys.path.insert(0, sys.argv[1])
from child_sparsity import ALGORITHMS
given, job = load_file(sys.argv[2] + "/given.safetensors"), json.loads(sys.argv[3])
names = job["pruned"]

class Weights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.ParameterDict({name: torch.nn.Parameter(given[name].clone()) for name in names})
    def forward(self, gradients):  # each gradient is what it is given
        return sum((self.model[name] * gradients[name]).sum() for name in names)

model = Weights()
optimizer = cstorch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-12, weight_decay=0.01)
algorithm = ALGORITHMS[job["changes"]["section"]["algorithm"]](job)
algorithm.apply(model)
algorithm.apply(optimizer)
model.load_state_dict({**model.state_dict(), **{"model." + name + "_mask": given[name + "_mask"] for name in names}})
found = {}
for step in range(1, job["steps"] + 1):
    optimizer.zero_grad()
    model({name: given["%s_gradient%d" % (name, step)] for name in names}).backward()
    optimizer.step()
    for name in names:
        state, mask = optimizer.state[model.model[name]], model.state_dict()["model." + name + "_mask"]
        found["%s_mask%d" % (name, step)] = mask.clone()
        found["%s_weight%d" % (name, step)] = model.model[name].detach() * mask
        found["%s_moments%d" % (name, step)] = (state["exp_avg"] * mask).clone()
save_file(found, sys.argv[2] + "/found.safetensors")
"""


@pytest.mark.modelzoo
@pytest.mark.parametrize("schedule", ["gradual", "rigl"])
def test_masks_are_ours_after_every_step_on_the_same_gradients(
    environment: SiteEnvironment, schedule: str, tmp_path: Path
) -> None:
    """The child's algorithms on the CPU backend beside `MaskedSteps`, two matrices, 24 steps: masks to the bit."""
    steps, generator, shapes = 24, torch.Generator().manual_seed(0), {"a": (30, 41), "b": (17, 9)}
    run = planned_run(schedule, update_every=4, gradual_updates=6)
    run = replace(run, protocol=replace(run.protocol, steps=steps))
    changing = ChangingMasks.from_run(run)
    assert changing is not None
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    rate = 1.0 if schedule == "gradual" else 0.3
    masks = {name: torch.rand(shape, generator=generator) < rate for name, shape in shapes.items()}
    weights = {name: torch.nn.Parameter(given[name] * masks[name]) for name in shapes}
    given |= {f"{name}_mask": mask for name, mask in masks.items()}
    for step in range(1, steps + 1):
        given |= {f"{name}_gradient{step}": torch.randn(shapes[name], generator=generator) for name in shapes}
    save_file(given, tmp_path / "given.safetensors")
    began = BitMasks.pack(masks.items())
    job = {"pruned": list(shapes), "steps": steps, "annotated": {}}
    job["changes"] = changing.job(changing.counts(shapes, began.kept))
    run_there(environment, TRAINING_THERE, CHILD.parent, tmp_path, json.dumps(job))
    found = load_file(tmp_path / "found.safetensors")

    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, eps=1e-12, weight_decay=0.01)
    current, regrown = CurrentMasks(began), 0
    hooks = MaskedSteps(weights, current, optimizer, MaskSchedule.from_run(run))
    for step in range(1, steps + 1):
        before = dict(current)
        for name, weight in weights.items():
            weight.grad = given[f"{name}_gradient{step}"].clone()
        hooks.clip(step, list(weights.values()), math.inf)
        optimizer.step()
        hooks.after(step)
        for name, weight in weights.items():
            assert torch.equal(found[f"{name}_mask{step}"], current[name]), (step, name)
            torch.testing.assert_close(found[f"{name}_weight{step}"], weight.detach(), atol=1e-5, rtol=1e-4)
            moment = optimizer.state[weight]["exp_avg"] * current[name]
            torch.testing.assert_close(found[f"{name}_moments{step}"], moment, atol=1e-5, rtol=1e-4)
            regrown += int((before[name] & current[name] & (weight == 0)).sum())
    assert (regrown > 0) == (schedule == "rigl")


@pytest.mark.modelzoo
@pytest.mark.parametrize(("schedule", "apart"), [("gradual", 1e-3), ("rigl", 1e-3), ("set", None), ("iterative", None)])
def test_a_cell_trains_there_as_it_does_here(
    llama: Path, environment: SiteEnvironment, schedule: str, apart: float | None, tmp_path: Path
) -> None:
    """Masks of 20 steps in float32 are equal but for weights whose order Model Zoo's epsilon decides; SET grows
    elsewhere."""
    ledger = Ledger(tmp_path)
    here = scheduled_run(llama, schedule)
    there = replace(
        scheduled_run(llama, schedule, backend="cerebras"), cerebras={"target": "cpu", "release": environment.release}
    )
    for run in (here, there):
        for level in (run.level_before, run):
            record = finished(level, ledger) if level else None
            assert record is None or record.status == "done", record.error
    expected, found = losses(ledger, here), losses(ledger, there)
    assert float(((found - expected) / expected).abs().max()) < LOSS_TOLERANCE
    ours, theirs = (ledger.run_folder(run.run_id) / "sparse_config.json" for run in (here, there))
    assert json.loads(ours.read_text())["kept_by_matrix"] == json.loads(theirs.read_text())["kept_by_matrix"]
    report = json.loads((ledger.run_folder(there.run_id) / "validation_report.json").read_text())
    assert report["all_valid"]
    if apart is not None:
        ours, theirs = (ledger.run_folder(run.run_id) / "masks.safetensors" for run in (here, there))
        differ = sum(int((load_file(ours)[name] != bits).sum()) for name, bits in load_file(theirs).items())
        assert differ / sum(8 * bits.numel() for bits in load_file(ours).values()) < apart


@pytest.mark.modelzoo
def test_a_lost_training_goes_on_with_the_masks_of_its_checkpoint(
    llama: Path, environment: SiteEnvironment, tmp_path: Path
) -> None:
    run = replace(
        scheduled_run(llama, "rigl", backend="cerebras"), cerebras={"target": "cpu", "release": environment.release}
    )
    stage = CerebrasTraining(Cerebras("cpu", checkpoint_steps=8))
    lost, whole = Ledger(tmp_path / "lost"), Ledger(tmp_path / "whole")
    lose_after(12, run, lost, stage)
    for ledger in (lost, whole):
        for _ in run_cell(run, ledger, WorkerCache(), stage):
            pass
    assert "goes on after step" in (lost.run_folder(run.run_id) / "train.log").read_text()
    records = [ledger.record(run.run_id) for ledger in (lost, whole)]
    assert len({record.metrics["weights_sha256"] for record in records if record}) == 1
    assert len({record.metrics["mask_sha256"] for record in records if record}) == 1
