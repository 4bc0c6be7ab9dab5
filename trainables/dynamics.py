"""Dynamics: what becomes of masks and zeros while a model trains, a record at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from trainables.mode import TrainableModel
from tune_sparse.errors import RunError
from tune_sparse.ledger.run import Run
from tune_sparse.models.architectures import list_matrices
from tune_sparse.modes import MODES
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.mask_dynamics import (
    History,
    begin_history,
    continue_history,
    dead_counts,
    effective_ranks,
    masked_gradient_norm,
    oriented_as_linear,
    slope,
    summed_zero_since,
    zero_gradient_norms,
)
from tune_sparse.pruning.masks import Masks, packed
from tune_sparse.schedules import Update
from tune_sparse.training.loop import StepHooks

TREND_RECORDS, GROWTH_RECORDS = 10, 5
DEAD_SHARES = {"error": 0.7, "warning": 0.5, "notice": 0.3}
"""The health of a record whose share of dead outputs or inputs is above one of these."""
SUMMARY = (
    *("sparsity/overall", "weight_revival/total", "weight_revival/never_revived_share", "zero_duration/mean"),
    *("dead_neurons/average.out", "dead_neurons/average.in"),
)
"""What a run's result has of its last record."""
Line = dict[str, Any]


class Dynamics:
    """The records of one training: one before its first step, one after each update of the masks, one every
    `dynamics_every` steps where masks change at all, and one after the last step.

    Between records nothing is computed. On the device it keeps two bits a weight: its masks of the last record, and
    which weights ever revived.
    """

    def __init__(self, run: Run, updates: Sequence[Update], parameters: int, write: Callable[[Line], None]) -> None:
        """parameters: of the whole model, tied ones once. write: gets each record, also those of a restored state."""
        self._settings, self._steps = run.schedule_settings, run.protocol.steps
        self._first_target = run.starting_sparsity
        self._at = {update.step for update in updates}
        self._parameters, self._write = parameters, write
        self._lines: list[Line] = []
        self._histories: dict[str, History] = {}
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}

    def is_due(self, step: int) -> bool:
        """Whether a record is made after the optimizer step of this number, from 1; 0 is the start."""
        regular = bool(self._at) and step % self._settings.dynamics_every == 0
        return regular or step in self._at or step in (0, self._steps)

    @torch.no_grad()
    def see_gradients(self, weights: Mapping[str, Tensor], masks: Masks) -> None:
        """Take the norms of the dense gradients, dL/dW_eff, of masked weights. Nothing waits for the device."""
        self._gradients = {}
        for name, weight in weights.items():
            if weight.grad is not None:
                mask = masks[name]
                self._gradients[name] = masked_gradient_norm(weight.grad, mask), (~mask).sum()

    @torch.no_grad()
    def record(self, step: int, update: Update | None, masks: Masks, weights: Mapping[str, Tensor]) -> Line:
        """Write one record of the masks as they are after a step (0: at the start) and its `update`, if it had one.

        Raises `RunError` where an update left more zeros than its sparsity allows.
        """
        bits = packed(masks)
        line: Line = {"step": step, "is_update": update is not None, "pruning/target": self._target_after(update)}
        line |= self._revival(step, bits) | self._sparsity(bits) | self._dead(bits) | self._gradient_norms()
        if self._settings.effective_rank_side and (update is not None or step in (0, self._steps)):
            line |= self._ranks(bits, weights)
        line |= self._trends(line)
        self._lines.append(line)
        self._write(line)
        if update is not None:
            self._check_sparsity(update, bits)
        return line

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs, taken between two steps."""
        histories = {name: [h.kept, h.revived, list(h.zero_since)] for name, h in self._histories.items()}
        return {"lines": json.dumps(self._lines), "histories": histories}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, and write its records again."""
        self._histories = {
            name: History(kept, revived, tuple(since)) for name, (kept, revived, since) in state["histories"].items()
        }
        self._lines = json.loads(state["lines"])
        for line in self._lines:
            self._write(line)

    def summary(self) -> dict[str, float]:
        """What the last record counts, whatever `dynamics_every`; empty before the first."""
        return {name: self._lines[-1][name] for name in SUMMARY} if self._lines else {}

    def _target_after(self, update: Update | None) -> float:
        """The sparsity of the last update so far, or that of the first masks."""
        if update is not None:
            return update.sparsity
        return float(self._lines[-1]["pruning/target"]) if self._lines else self._first_target

    def _revival(self, step: int, masks: BitMasks) -> Line:
        """What came back since the last record, what stayed zero, and for how long."""
        if not self._histories:
            self._histories = {name: begin_history(bits) for name, bits in masks.bits.items()}
        pairs = {name: continue_history(self._histories[name], bits, step) for name, bits in masks.bits.items()}
        self._histories = {name: history for name, (history, _) in pairs.items()}
        revived, at_either, now_or_revived = torch.stack([counts for _, counts in pairs.values()]).sum(0).tolist()
        size, zeros = _size(masks), _zeros(masks)
        stable, never = size - at_either, size - now_or_revived
        since = sum(map(summed_zero_since, self._histories.values()))
        return {
            "weight_revival/revived": revived,
            "weight_revival/stable_zeros": stable,
            "weight_revival/rate": revived / max(1, revived + stable),
            "weight_revival/total": revived + (self._lines[-1]["weight_revival/total"] if self._lines else 0),
            "weight_revival/never_revived_share": never / max(1, zeros),
            "zero_duration/mean": step - since / zeros if zeros else 0.0,
        }

    def _sparsity(self, masks: BitMasks) -> Line:
        zeros = _zeros(masks)
        whole = {"sparsity/overall": zeros / _size(masks), "sparsity/all_parameters": zeros / self._parameters}
        return whole | {
            f"layer_sparsity/{name}": 1 - masks.kept[name] / prod(shape) for name, shape in masks.shapes.items()
        }

    def _dead(self, masks: BitMasks) -> Line:
        """Shares of outputs and inputs of which no weight is kept, and the health that they mean."""
        dead = torch.stack([dead_counts(name, masks[name]) for name in masks]).tolist()
        line: Line = {}
        sides = [_sides(name, masks.shapes[name]) for name in masks]
        for i, kind in enumerate(("out", "in")):
            counts, sizes = [own[i] for own in dead], [own[i] for own in sides]
            for name, count, size in zip(masks, counts, sizes, strict=True):
                line[f"dead_neurons/{name}.{kind}"] = count / size
            line[f"dead_neurons/average.{kind}"] = sum(counts) / sum(sizes)
        worst = max(line["dead_neurons/average.out"], line["dead_neurons/average.in"])
        return line | {"health": next((word for word, share in DEAD_SHARES.items() if worst > share), "good")}

    def _gradient_norms(self) -> Line:
        """Of the gradients of this step; none at the start."""
        if not self._gradients:
            return {}
        norms, zeros = (torch.stack(column).tolist() for column in zip(*self._gradients.values(), strict=True))
        names = list(self._gradients)
        self._gradients = {}
        return dict(zero_gradient_norms(dict(zip(names, norms, strict=True)), dict(zip(names, zeros, strict=True))))

    def _ranks(self, masks: BitMasks, weights: Mapping[str, Tensor]) -> Line:
        """Effective ranks of the effective weights of matrices that are not larger than is asked for."""
        line: Line = {}
        for name, weight in weights.items():
            if max(weight.shape) <= self._settings.effective_rank_side:
                rank, entropy = effective_ranks(oriented_as_linear(name, weight.detach() * masks[name]))
                line |= {f"effective_rank/{name}": rank, f"entropy_rank/{name}": entropy}
        for kind in ("effective_rank", "entropy_rank"):
            values = [value for name, value in line.items() if name.startswith(f"{kind}/")]
            line |= {f"{kind}/average": sum(values) / len(values)} if values else {}
        return line

    def _trends(self, line: Line) -> Line:
        """Of the last records, `line` the newest of them."""
        recent = [*self._lines[1 - TREND_RECORDS :], line]
        sparsities = [record["sparsity/overall"] for record in recent]
        rates = [record["weight_revival/rate"] for record in recent]
        steps = sparsities[-GROWTH_RECORDS:]
        return {
            "pruning/growth_rate": (steps[-1] - steps[0]) / max(1, len(steps) - 1),
            "trends/sparsity_slope": slope(sparsities),
            "trends/average_revival_rate": sum(rates) / len(rates),
        }

    def _check_sparsity(self, update: Update, masks: BitMasks) -> None:
        """One element a matrix is rounding. What began sparser than its target, as whole heads may, may stay so."""
        size = _size(masks)
        limit = max(update.sparsity, self._lines[0]["sparsity/overall"]) * size + len(masks)
        if _zeros(masks) > limit:
            raise RunError(
                f"an update must not prune more than its sparsity, {update.sparsity:g} of {size} weights, "
                f"got {_zeros(masks)} zeros after step {update.step}. Report it: the masks of this run are wrong."
            )


class RecordedSteps(StepHooks):
    """The steps of a training, of which dynamics record the masks."""

    def __init__(self, steps: StepHooks, trainable: TrainableModel, dynamics: Dynamics, updates: Sequence[Update]):
        model = trainable.model
        self._steps, self._trainable, self._dynamics = steps, trainable, dynamics
        self._weights = {matrix.name: model.get_parameter(matrix.name) for matrix in list_matrices(model)}
        self._updates = {update.step: update for update in updates}

    def before(self, step: int) -> None:
        self._steps.before(step)
        if step == 1:
            self._record(0)

    def clip(self, step: int, parameters: list[Tensor], max_norm: float) -> None:
        if self._dynamics.is_due(step):
            self._dynamics.see_gradients(self._weights, self._trainable.masks)
        self._steps.clip(step, parameters, max_norm)

    def after(self, step: int) -> None:
        self._steps.after(step)
        if self._dynamics.is_due(step):
            self._record(step)

    def _record(self, step: int) -> None:
        self._dynamics.record(step, self._updates.get(step), self._trainable.masks, self._weights)

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps.state(), "dynamics": self._dynamics.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["steps"]:
            self._steps.restore(state["steps"])
        self._dynamics.restore(state["dynamics"])

    def summary(self) -> dict[str, float]:
        return self._dynamics.summary()


def recorded(steps: StepHooks, run: Run, trainable: TrainableModel, write: Callable[[Line], None]) -> StepHooks:
    """The steps of a run, their masks recorded where the masked weights themselves are trained."""
    if MODES[run.cell.mode].has_adapter:
        return steps
    parameters = sum(parameter.numel() for parameter in trainable.model.parameters())
    return RecordedSteps(steps, trainable, Dynamics(run, run.updates, parameters, write), run.updates)


def _zeros(masks: BitMasks) -> int:
    return sum(prod(shape) - masks.kept[name] for name, shape in masks.shapes.items())


def _size(masks: BitMasks) -> int:
    return sum(map(prod, masks.shapes.values()))


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(O, I) of a matrix from its shape in the checkpoint."""
    return tuple(oriented_as_linear(name, torch.empty(shape, device="meta")).shape)
