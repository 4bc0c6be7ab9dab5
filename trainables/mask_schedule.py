"""How the masks of one training change: its updates, and what each of them does to every matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from tune_sparse.errors import RunError
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.allocation import global_order
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.mask_updates import (
    Change,
    counts_by_shape,
    cut,
    drop_count,
    global_counts,
    random_growth,
    regrow,
    select,
)
from tune_sparse.pruning.masks import pruned_count
from tune_sparse.pruning.methods import METHODS
from tune_sparse.schedules import SCHEDULES, Update


@dataclass(frozen=True)
class MaskSchedule:
    """A schedule in one training. By default masks stay as they are."""

    updates: Mapping[int, Update] = field(default_factory=dict)
    """by the number of the step after which each comes"""
    allocation: str = "uniform"
    grows: str | None = None
    """"random" or by "gradient"; None where weights are cut"""
    is_revivable: bool = False
    """Weights are trained on below their mask, and cuts choose among all of them."""
    seed: int = 0

    @classmethod
    def from_run(cls, run: Run) -> MaskSchedule:
        facts = SCHEDULES[run.cell.schedule]
        updates = {update.step: update for update in run.updates}
        allocation = METHODS[run.cell.method].allocation if run.is_pruned else "uniform"
        is_revivable = facts.read(run.schedule_settings).get("revivable", False)
        return cls(updates, allocation, facts.grows, is_revivable, run.draw_seed)

    def grows_by_gradient_after(self, step: int) -> bool:
        """Whether there is an update after this step that reads gradients of masked weights."""
        return self.grows == "gradient" and step in self.updates

    def changes(self, update: Update, weights: Mapping[str, Tensor], masks: BitMasks) -> Iterator[tuple[str, Change]]:
        """What an update does to each matrix, one at a time. weights: of the last step, with their gradients.

        Raises `InputError` where a matrix would lose everything.
        """
        pruned = {} if self.grows is not None else self._counts(update, weights, masks)
        for name, weight in weights.items():
            if self.grows is not None:
                yield name, self._regrown(update, name, weight, masks)
            elif self.is_revivable:
                yield name, select(weight.detach(), masks[name], pruned[name])
            else:
                yield name, cut(weight.detach(), masks[name], masks.kept[name], pruned[name])

    def _regrown(self, update: Update, name: str, weight: Tensor, masks: BitMasks) -> Change:
        kept = masks.kept[name]
        dropped = drop_count(weight.numel(), kept, update.drop_fraction)
        if self.grows == "random":
            growth = random_growth(weight, self.seed, update.step, name)
        else:  # a matrix that no token of the step reached has no gradient: it is 0
            growth = weight.new_zeros(weight.shape) if weight.grad is None else weight.grad
        return regrow(weight.detach(), masks[name], kept, dropped, growth)

    def _counts(self, update: Update, weights: Mapping[str, Tensor], masks: BitMasks) -> dict[str, int]:
        """{matrix: weights pruned after an update}"""
        if self.allocation != "global":
            return counts_by_shape(self.allocation, masks.shapes, update.sparsity)
        if self.is_revivable:
            sizes = {name: weight.numel() for name, weight in weights.items()}
            counts = global_order(sizes, [update.sparsity], lambda name: weights[name].detach())
            return {name: pruned for name, (pruned,) in counts.items()}

        def kept_weights(name: str) -> Tensor:
            return weights[name].detach()[masks[name]]

        return global_counts(masks.shapes, masks.kept, update.sparsity, kept_weights)

    def check_reached(self, began: BitMasks, ended: BitMasks, sparsity: float) -> None:
        """Raise `RunError` unless a training ended with exactly the zeros of its target.

        Cuts end with those of one shot; growth keeps those that it began with.
        """
        planned = sum(began.kept.values())
        if self.updates and self.grows is None:
            total = sum(map(prod, ended.shapes.values()))
            if self.allocation == "global":
                planned = total - pruned_count(total, sparsity)
            else:
                planned = total - sum(counts_by_shape(self.allocation, ended.shapes, sparsity).values())
        if (found := sum(ended.kept.values())) != planned:
            raise RunError(f"a schedule must end with {planned} kept weights, got {found}. Report it.")


FIXED_MASKS = MaskSchedule()
