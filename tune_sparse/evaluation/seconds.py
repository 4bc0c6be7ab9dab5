"""The seconds of a cell on a card that nobody has measured: counted operations and bytes over assumed rates.

Only for a forecast: a measured run of the same kind is worth more. Left out: attention's own products, which are small
at the lengths of these tasks, and the waits of a trial for disk and network.
"""

from __future__ import annotations

from dataclasses import dataclass

from tune_sparse.evaluation.cards import Card
from tune_sparse.evaluation.memory import FLOAT, CellMemory
from tune_sparse.models.architectures import matrix_sizes
from tune_sparse.modes import MODES
from tune_sparse.pruning.methods import METHODS
from tune_sparse.pruning.reconstruction import ITERATIONS
from tune_sparse.training.budgets import Budgets

PADDED_OVER_TRUE = 1.07
"""Tokens of micro-batches sorted by length over their true tokens."""
LEAST_SECONDS = 0.1
"""A micro-batch of a model of 32 layers takes so long to launch."""
LAUNCHED_LAYERS = 32
REBUILT_BYTES = 50
"""Read and written a weight to build W_eff and to mask its gradient: counted (docs/scale.md)."""
DECODING_SECONDS = 0.03
"""A step of generation takes at least so long to launch at 32 layers."""
SCORING_RATE = 0.75
"""Of the rate of training: shorter passes."""
STREAMED_BYTES_A_SECOND = 1e9
"""Weights read from disk, hashed and written, on one core."""
STREAMED_TIMES = 2
COLUMN_SECONDS = 4e-5
"""SparseGPT launches so long for each column."""
RECOVERY_PASSES = 4
"""Passes of the examples through a block, many of them in part, while it is recovered."""
SHARED_BEFORE_TUNING = 0.5
"""The accuracy before tuning is computed once for both modes."""


@dataclass(frozen=True)
class TaskSizes:
    """How much a task has to train on and to score."""

    train_tokens: float
    """of a training example, on average"""
    test_examples: float
    test_tokens: float
    """computed for each test example: a prefix that choices share once"""
    is_generated: bool = False
    """Answers are written, of at most `max_new_tokens`."""


@dataclass(frozen=True)
class CellSeconds:
    """A cell on a card."""

    cell: CellMemory
    card: Card
    budgets: Budgets
    sizes: TaskSizes

    @property
    def total(self) -> float:
        return self.training + self.scoring + self.pruning + self.streaming

    @property
    def training(self) -> float:
        """Forward and input gradient take 2 operations a weight and token each, the gradient of a masked update or of a
        weight 2 more, and a forward that is computed again 2 more; on the model that is trained."""
        cell, budgets = self.cell.in_training, self.budgets
        protocol, mode = cell.protocol, MODES[cell.mode]
        of_weights = cell.masks_update or not mode.has_adapter
        operations = 4 + 2 * of_weights + 2 * budgets.activation_checkpointing
        tokens = protocol.steps * protocol.global_batch_size * self.sizes.train_tokens * PADDED_OVER_TRUE
        passes = max(protocol.steps, tokens / budgets.micro_batch_tokens)
        computing = tokens * operations * _active_weights(cell) / self.card.rate(protocol.precision)
        builds = protocol.steps if budgets.keeps_effective_weights else passes
        built = builds * REBUILT_BYTES * cell.prunable * cell.masks_update
        updated = protocol.steps * 7 * cell.trained * (not mode.has_adapter) / 4
        return max(computing, passes * LEAST_SECONDS * self._depth) + (built + updated) / self.card.bandwidth

    @property
    def scoring(self) -> float:
        """Before tuning, merged, and where a last mask is applied, also before it."""
        return (1 + SHARED_BEFORE_TUNING + MODES[self.cell.mode].masks_at_merge) * self._scored_once

    @property
    def _scored_once(self) -> float:
        sizes, protocol = self.sizes, self.cell.protocol
        read = sizes.test_examples * sizes.test_tokens
        rate = SCORING_RATE * self.card.rate(protocol.precision)
        passes = 2 * read * _active_weights(self.cell) / rate
        if not sizes.is_generated:
            return passes
        tokens = read + sizes.test_examples * protocol.max_new_tokens
        batches = max(1.0, tokens / self.budgets.generation_tokens)
        kept = self.cell.weights + min(tokens, self.budgets.generation_tokens) * self.cell.cache_bytes
        step = max(DECODING_SECONDS * self._depth, kept / self.card.bandwidth)
        return passes + batches * protocol.max_new_tokens * step

    @property
    def pruning(self) -> float:
        """Calibration, and SparseGPT's columns: once for both modes. Scores take a few passes over the weights."""
        method, protocol = METHODS.get(self.cell.method), self.cell.protocol
        if method is None:
            return 0.0
        scored = 16 * self.cell.prunable / self.card.bandwidth
        is_recovered = protocol.recover != "none"
        if not (method.is_calibrated or is_recovered):
            return scored
        tokens = protocol.calibration_tokens
        operations = 6 if method.needs.gradients else 2
        operations += 2 * RECOVERY_PASSES * is_recovered
        measured = tokens * operations * _active_weights(self.cell) / self.card.rate(protocol.precision)
        measured += self._updating if method.updates_weights else 0.0
        measured += self._solving(tokens) if is_recovered else 0.0
        return scored + measured * SHARED_BEFORE_TUNING

    def _solving(self, tokens: int) -> float:
        """Sums of the inputs, and the steps of conjugate gradients."""
        sums = tokens * self.cell.dims.num_layers * self.cell.hessians / FLOAT
        steps = (ITERATIONS + 1) * sum(rows * width**2 for rows, width in matrix_sizes(self.cell.dims).values())
        return 2 * (sums + steps) / self.card.float32_flops

    @property
    def _updating(self) -> float:
        sizes = matrix_sizes(self.cell.dims).values()
        columns = sum(width for _, width in sizes)
        products = sum(2 * rows * width**2 for rows, width in sizes)
        return columns * COLUMN_SECONDS + products / self.card.float32_flops

    @property
    def streaming(self) -> float:
        return STREAMED_TIMES * self.cell.weights / STREAMED_BYTES_A_SECOND

    @property
    def _depth(self) -> float:
        return self.cell.dims.num_layers / LAUNCHED_LAYERS


def _active_weights(cell: CellMemory) -> float:
    """Prunable weights that compute a token: those of its experts alone."""
    return cell.prunable * cell.dims.experts_per_token / cell.dims.num_experts
