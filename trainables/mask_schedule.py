"""How the masks of one training change: its updates, and what each of them does to every matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from tune_sparse.errors import RunError
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.allocation import global_order
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.mask_updates import (
    Change,
    cut,
    drop_count,
    global_counts,
    random_growth,
    regrow,
    select,
    uniform_counts,
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
        if self.grows is not None:
            change = partial(self._regrown, update)
        elif self.is_revivable:
            change = partial(_selected, self._counts_of_all(update, weights))
        else:
            change = partial(_cut, self._counts_of_kept(update, weights, masks))
        for name, weight in weights.items():
            yield name, change(name, weight, masks)

    def _regrown(self, update: Update, name: str, weight: Tensor, masks: BitMasks) -> Change:
        kept = masks.kept[name]
        dropped = drop_count(weight.numel(), kept, update.drop_fraction)
        if self.grows == "random":
            growth = random_growth(weight, self.seed, update.step, name)
        else:
            growth = weight.new_zeros(weight.shape) if weight.grad is None else weight.grad
        return regrow(weight.detach(), masks[name], kept, dropped, growth)

    def _counts_of_all(self, update: Update, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """{matrix: weights pruned}, chosen among all weights as at one shot."""
        sizes = _sizes(weights)
        if self.allocation == "uniform":
            return uniform_counts(sizes, update.sparsity)
        counts = global_order(sizes, [update.sparsity], lambda name: weights[name].detach())
        return {name: pruned for name, (pruned,) in counts.items()}

    def _counts_of_kept(self, update: Update, weights: Mapping[str, Tensor], masks: BitMasks) -> dict[str, int]:
        """{matrix: weights pruned}, where those that are pruned already stay so."""
        sizes = _sizes(weights)
        if self.allocation == "uniform":
            return uniform_counts(sizes, update.sparsity)
        kept_weights = lambda name: weights[name].detach()[masks[name]]  # noqa: E731
        return global_counts(sizes, masks.kept, update.sparsity, kept_weights)

    def check_reached(self, began: BitMasks, ended: BitMasks, sparsity: float) -> None:
        """Raise `RunError` unless a training ended with exactly the zeros of its target.

        Cuts end with those of one shot; growth keeps those that it began with.
        """
        planned = sum(began.kept.values())
        if self.updates and self.grows is None:
            sizes = {name: mask.numel() for name, mask in ended.items()}
            total = sum(sizes.values())
            uniform = sum(uniform_counts(sizes, sparsity).values())
            planned = total - (uniform if self.allocation == "uniform" else pruned_count(total, sparsity))
        if (found := sum(ended.kept.values())) != planned:
            raise RunError(f"a schedule must end with {planned} kept weights, got {found}. Report it.")


FIXED_MASKS = MaskSchedule()


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: weight.numel() for name, weight in weights.items()}


def _selected(pruned: Mapping[str, int], name: str, weight: Tensor, masks: BitMasks) -> Change:
    return select(weight.detach(), masks[name], pruned[name])


def _cut(pruned: Mapping[str, int], name: str, weight: Tensor, masks: BitMasks) -> Change:
    return cut(weight.detach(), masks[name], masks.kept[name], pruned[name])
