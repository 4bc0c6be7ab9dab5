"""The invariants of masks that change while weights train, at every update of every schedule."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainables.mask_schedule import FIXED_MASKS, MaskSchedule
from trainables.masked_steps import CurrentMasks, MaskedSteps
from tune_sparse.errors import InputError, RunError
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.mask_updates import drop_count
from tune_sparse.pruning.masks import keep_highest, pruned_count
from tune_sparse.schedules import Update

STEPS, TARGET = 6, 0.6
RISE = {2: Update(2, 0.2), 3: Update(3, 0.45), 5: Update(5, TARGET)}
REGROW = {2: Update(2, TARGET, 0.5), 4: Update(4, TARGET, 0.3)}
SCHEDULES = {
    "one-shot": FIXED_MASKS,
    "gradual": MaskSchedule(RISE),
    "gradual global": MaskSchedule(RISE, "global"),
    "gradual erk": MaskSchedule(RISE, "erk"),
    "revivable": MaskSchedule(RISE, is_revivable=True),
    "revivable global": MaskSchedule(RISE, "global", is_revivable=True),
    "set": MaskSchedule(REGROW, grows="random", seed=7),
    "rigl": MaskSchedule(REGROW, grows="gradient"),
}
MONOTONE = ("gradual", "gradual global", "gradual erk")
NUMBERS = st.sampled_from([0.0, -0.5, 0.5, 0.25, 1.0, -1.0])
"""Few, so that many tie."""


@dataclass
class Toy:
    """Matrices whose gradients are given, in training."""

    weights: dict[str, nn.Parameter]
    masks: CurrentMasks
    schedule: MaskSchedule
    gradients: list[dict[str, Tensor]]
    """of each step"""

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()), lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.steps = MaskedSteps(self.weights, self.masks, self.optimizer, self.schedule)

    def begin_step(self, step: int) -> None:
        """Everything of a step but the update after it."""
        for name, weight in self.weights.items():
            weight.grad = self.gradients[step - 1][name].clone()
        self.steps.clip(step, list(self.weights.values()), 1.0)
        self.optimizer.step()

    def run(self, done: int = 0) -> Iterator[int]:
        for step in range(done + 1, STEPS + 1):
            self.begin_step(step)
            self.steps.after(step)
            self.optimizer.zero_grad()
            yield step

    def tensors(self, name: str) -> list[Tensor]:
        """The weight and its moments."""
        weight = self.weights[name]
        state = self.optimizer.state[weight]
        return [weight.detach(), state["exp_avg"], state["exp_avg_sq"]]

    def copy(self) -> Toy:
        """The same by checkpoint: tensors, the optimizer's state, that of the masks."""
        weights = {name: nn.Parameter(weight.detach().clone()) for name, weight in self.weights.items()}
        bits = {name: torch.zeros_like(packed) for name, packed in self.masks.now.bits.items()}
        masks = self.masks.now if not self.schedule.updates else BitMasks.from_bits(bits, self.masks.now.shapes)
        made = replace(self, weights=weights, masks=CurrentMasks(masks))
        made.optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))
        if state := self.steps.state():
            made.steps.restore({name: dict(value) for name, value in state.items()})
        return made


@st.composite
def toys(draw: st.DrawFn, names: tuple[str, ...] = tuple(SCHEDULES)) -> tuple[str, Toy]:
    name = draw(st.sampled_from(names))
    schedule = SCHEDULES[name]
    shapes = {key: (draw(st.integers(1, 5)), draw(st.integers(4, 9))) for key in "ab"[: draw(st.integers(1, 2))]}

    def drawn(shape: tuple[int, int]) -> Tensor:
        size = shape[0] * shape[1]
        return torch.tensor(draw(st.lists(NUMBERS, min_size=size, max_size=size))).view(shape)

    dense = {key: drawn(shape) for key, shape in shapes.items()}
    starts_dense = schedule.updates == RISE
    masks = {
        key: keep_highest(weight.abs(), 0 if starts_dense else pruned_count(weight.numel(), TARGET))
        for key, weight in dense.items()
    }
    weights = {key: nn.Parameter(weight * masks[key]) for key, weight in dense.items()}
    gradients = [{key: drawn(shape) for key, shape in shapes.items()} for _ in range(STEPS)]
    return name, Toy(weights, CurrentMasks(BitMasks.pack(masks.items())), schedule, gradients)


def zeros(masks: BitMasks) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.items()}


@settings(deadline=None, max_examples=60)
@given(toys())
def test_every_update_of_every_schedule_keeps_the_invariants(named: tuple[str, Toy]) -> None:
    name, toy = named
    began = toy.masks.now
    before, sizes = began, {key: weight.numel() for key, weight in toy.weights.items()}
    try:
        for step in toy.run():
            now, update = toy.masks.now, toy.schedule.updates.get(step)
            assert now.kept == {key: int(mask.sum()) for key, mask in now.items()}
            if update is None:
                assert now is before
            elif toy.schedule.grows:
                assert now.kept == began.kept
            elif toy.schedule.allocation != "uniform":
                assert sum(zeros(now).values()) == pruned_count(sum(sizes.values()), update.sparsity)
            else:
                assert zeros(now) == {key: pruned_count(size, update.sparsity) for key, size in sizes.items()}
            for key in sizes:
                assert name not in MONOTONE or not (now[key] & ~before[key]).any()
                assert toy.schedule.is_revivable or not any(t[~now[key]].any() for t in toy.tensors(key))
            before = now
    except InputError:  # a cut may take a whole matrix of so few weights
        return
    toy.schedule.check_reached(began, toy.masks.now, TARGET)


@settings(deadline=None, max_examples=30)
@given(toys(("gradual", "revivable", "set", "rigl")))
def test_an_update_changes_no_bit_of_what_survives_it(named: tuple[str, Toy]) -> None:
    _, toy = named
    for step in range(1, STEPS + 1):
        toy.begin_step(step)
        old, before = toy.masks.now, {key: [t.clone() for t in toy.tensors(key)] for key in toy.weights}
        toy.steps.after(step)
        for key in toy.weights:
            grown = toy.masks.now[key] & ~old[key]
            for was, now in zip(before[key], toy.tensors(key), strict=True):
                changed = was != now
                assert not (changed & (now != 0)).any()
                assert toy.schedule.is_revivable or not now[grown].any()
            if step not in toy.schedule.updates or toy.schedule.is_revivable:
                assert all(map(torch.equal, before[key], toy.tensors(key)))


@settings(deadline=None, max_examples=30)
@given(toys(), st.integers(1, STEPS - 1))
def test_a_training_that_goes_on_from_any_step_ends_with_the_same_bits(named: tuple[str, Toy], at: int) -> None:
    _, toy = named
    try:
        for step in toy.run():
            if step == at:
                resumed = toy.copy()
    except InputError:
        return
    assert list(resumed.run(done=at))[-1] == STEPS
    assert resumed.masks.now.sha256 == toy.masks.now.sha256
    for key in toy.weights:
        assert all(map(torch.equal, toy.tensors(key), resumed.tensors(key)))


def toy_of(schedule: MaskSchedule, weight: Tensor, keep: Tensor, gradient: Tensor) -> Toy:
    masks = CurrentMasks(BitMasks.pack([("w", keep)]))
    return Toy({"w": nn.Parameter(weight * keep)}, masks, schedule, [{"w": gradient}] * STEPS)


WEIGHT = torch.tensor([[3.0, 0.0, 0.1, 2.0, 0.0, 5.0]])
KEEP = WEIGHT != 0
GRADIENT = torch.tensor([[0.3, 0.5, 0.2, -0.1, -9.0, 0.4]])


def test_clipping_does_not_see_what_is_masked() -> None:
    toy = toy_of(FIXED_MASKS, WEIGHT, KEEP, GRADIENT)
    toy.begin_step(1)
    assert toy.weights["w"].grad is not None
    assert torch.equal(toy.weights["w"].grad, GRADIENT * KEEP)  # its norm is .55, with the masked it would be 9.0


def test_a_step_before_an_update_by_gradient_is_the_same_step() -> None:
    """Dense gradients stay for the update, and neither the norm nor a kept weight sees them."""
    large = GRADIENT * 10
    plain = toy_of(FIXED_MASKS, WEIGHT, KEEP, large)
    growing = toy_of(MaskSchedule({1: Update(1, 1 / 3, 0.25)}, grows="gradient"), WEIGHT, KEEP, large)
    for toy in (plain, growing):
        toy.begin_step(1)
    for one, other in zip(plain.tensors("w"), growing.tensors("w"), strict=True):
        assert torch.equal(one[KEEP], other[KEEP])


def test_rigl_by_hand() -> None:
    toy = toy_of(MaskSchedule({1: Update(1, 1 / 3, 0.25)}, grows="gradient"), WEIGHT, KEEP, GRADIENT)
    next(toy.run())
    assert toy.masks.now["w"].tolist() == [[True, False, False, True, True, True]]  # 0.1 went, -9 came
    weight, *moments = toy.tensors("w")
    assert weight[0, 4] == weight[0, 2] == 0
    assert not any(moment[0, [1, 2, 4]].any() for moment in moments)


def test_a_whole_matrix_loses_nothing_to_regrowth() -> None:
    toy = toy_of(SCHEDULES["rigl"], WEIGHT + 1, torch.ones_like(KEEP), GRADIENT)
    assert drop_count(6, 6, 0.5) == 0
    for _ in toy.run():
        assert toy.weights["w"].all()


@pytest.mark.parametrize("grows", ["random", "gradient"])
def test_without_updates_growth_is_one_shot_to_the_bit(grows: str) -> None:
    plain, growing = (toy_of(s, WEIGHT, KEEP, GRADIENT) for s in (FIXED_MASKS, MaskSchedule({}, grows=grows)))
    for _ in zip(plain.run(), growing.run(), strict=True):
        assert all(map(torch.equal, plain.tensors("w"), growing.tensors("w")))


def test_one_cut_before_the_first_step_is_the_one_shot_training_to_the_bit() -> None:
    """A cut of the dense weights to the target at once is the one-shot mask, and every step after it the same."""
    gradual = toy_of(MaskSchedule({0: Update(0, 0.5)}), WEIGHT, torch.ones_like(KEEP), GRADIENT)
    gradual.steps.after(0)
    keep = keep_highest(WEIGHT.abs(), 3)
    assert torch.equal(gradual.masks.now["w"], keep)
    one_shot = toy_of(FIXED_MASKS, WEIGHT, keep, GRADIENT)
    for _ in zip(gradual.run(), one_shot.run(), strict=True):
        assert all(map(torch.equal, gradual.tensors("w"), one_shot.tensors("w")))


def test_a_revived_weight_has_gone_on_below_its_mask() -> None:
    """The smallest is pruned, its gradient goes on, and the next cut chooses it again."""
    weight, whole = torch.tensor([[0.1, 0.3, 0.5, 0.7]]), torch.ones(1, 4).bool()
    pulls = torch.tensor([[-9.0, 0.0, 0.0, 0.0]])
    toy = toy_of(MaskSchedule({1: Update(1, 0.5), 5: Update(5, 0.25)}, is_revivable=True), weight, whole, pulls * 0)
    toy.gradients = [{"w": pulls * 0}] + [{"w": pulls}] * (STEPS - 1)
    masks = [toy.masks.now["w"].tolist()[0] for _ in toy.run()]
    assert masks[0] == masks[3] == [False, False, True, True]
    assert masks[4] == [True, False, True, True]


def test_a_training_that_misses_its_target_fails() -> None:
    began, ended = (BitMasks.pack([("w", mask)]) for mask in (torch.ones(1, 4).bool(), KEEP[:, :4]))
    with pytest.raises(RunError, match="a schedule must end with 2 kept weights, got 3"):
        MaskSchedule({1: Update(1, 0.5)}).check_reached(began, ended, 0.5)


def test_a_matrix_without_gradient_is_updated_as_by_zeros() -> None:
    toy = toy_of(SCHEDULES["rigl"], WEIGHT, KEEP, GRADIENT)
    toy.weights["w"].grad = None
    toy.steps.after(2)
    assert toy.masks.now.kept == {"w": 4}
