"""Recovery by reconstruction: the weights that a mask keeps are solved for what the dense matrix computes.

Block after block, on the outputs of the blocks that are pruned and recovered already, and in a block matrix after
matrix, on what those before it compute now. Each matrix is a least-squares problem in its rows, which share the inputs
and have survivors of their own; conjugate gradients on the masked matrix solve all rows at once by products alone,
without a factor for each row. A block keeps what was solved only if it is closer to the dense block, given the same
inputs, on examples that no matrix was solved on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.models.architectures import INPUTS, Matrix
from tune_sparse.pruning.calibration import BlockArgs, Blocks, InputKey, first_inputs, recorded
from tune_sparse.pruning.methods import method_named
from tune_sparse.watchdog import heartbeat

DAMPING = 0.01
"""Fraction of the mean of the Gram matrix's diagonal that pulls each weight towards its dense value."""
ITERATIONS = 15
"""Steps of conjugate gradients. More change the error on other examples in its third digit."""
HELD_OUT_EVERY = 4
"""One example of so many is kept from the solver, and judges what it solved."""
SOLVED_AT_ONCE = 1 << 23
"""Weights of the rows of one matrix that are solved together, each of which takes 28 bytes for that time."""
TINY = 1e-30
"""Keeps quotients of rows that are solved already finite."""


@dataclass(frozen=True)
class Closeness:
    """The distance of a pruned block from the dense one on the same inputs X, on examples that were held out.

    Y is what the dense block computes. A few tokens of some blocks are a thousand times larger than all others and
    decide the first number; the second counts each token alike.
    """

    squared_error: float
    """Σ‖block(X) - Y‖² / Σ‖Y - X‖² over all tokens"""
    token_error: float
    """Mean over tokens of ‖block(x) - y‖² / ‖y - x‖²"""

    def is_within(self, other: Closeness) -> bool:
        return self.squared_error <= other.squared_error and self.token_error <= other.token_error


@dataclass(frozen=True)
class BlockRecovery:
    """One block before and after its recovery, and which of the two it kept."""

    block: int
    before: Closeness
    after: Closeness
    is_accepted: bool


def damp_into(gram: Tensor) -> Tensor:
    """Add to X Xᵀ, (I, I), in place what pulls the solution towards the dense weight."""
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    return gram


def solve(start: Tensor, dense: Tensor, mask: Tensor, damped: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The weight W, zero outside the mask, that minimises ‖(W - dense) X‖² + λ ‖W - dense‖²: (O, I) in float32.

    start, dense: (O, I). mask: (O, I), bool. damped: X Xᵀ + λ over the tokens of the inputs, (I, I) in float32.
    Conjugate gradients with the diagonal as their preconditioner start from `start`; the objective rises in no step.
    """
    rows = max(1, SOLVED_AT_ONCE // len(damped))
    solution = torch.empty_like(start, dtype=torch.float32)
    for first in range(0, len(start), rows):
        at = slice(first, first + rows)
        solution[at] = _solve_rows(start[at], dense[at], mask[at], damped, iterations)
    return solution


def _solve_rows(start: Tensor, dense: Tensor, mask: Tensor, damped: Tensor, iterations: int) -> Tensor:
    keep, scale = mask.float(), 1 / damped.diagonal().clamp_min(TINY)
    weight = start.float() * keep
    residual = ((dense.float() - weight) @ damped).mul_(keep)
    direction = residual * scale
    slope = (residual * direction).sum(dim=1, keepdim=True)
    for _ in range(iterations):
        change = (direction @ damped).mul_(keep)
        step = slope / (direction * change).sum(dim=1, keepdim=True).clamp_min(TINY)
        weight.addcmul_(step, direction)
        residual.addcmul_(step, change, value=-1)
        preconditioned = residual * scale
        steeper = (residual * preconditioned).sum(dim=1, keepdim=True)
        direction.mul_(steeper / slope.clamp_min(TINY)).add_(preconditioned)
        slope = steeper
    return weight.masked_fill_(~mask, 0)


def check_recoverable(method: str, recover: str) -> None:
    """Raise `InputError` for a recovery that would change no weight."""
    if recover != "none" and method_named(method).pattern == "structured":
        raise InputError(
            f"recover={recover} solves for what a layer computes of its inputs, got {method}: without whole heads and "
            "channels the layers that are left compute that already. Set recover=none, or leave the method out."
        )


def check_windows(count: int) -> None:
    """Raise `InputError` for too few calibration windows."""
    if count < HELD_OUT_EVERY:
        raise InputError(
            f"recovery needs {HELD_OUT_EVERY} calibration windows, one of which judges it, got {count}. "
            "Give more text, raise calibration_tokens, or lower calibration_window."
        )


def reconstruct_into(
    blocks: Blocks, dense: Mapping[str, Tensor], masks: Mapping[str, Tensor], examples: Sequence[Encoded]
) -> Iterator[BlockRecovery]:
    """Recover pruned blocks in place, one after the other; what each one came to is yielded once it is written.

    dense, masks: {matrix: its dense weight, its keep-mask}, in the checkpoint's layout. Raises `InputError` for fewer
    than four windows.
    """
    check_windows(len(examples))
    stream = Stream(*first_inputs(blocks, examples))
    for number in range(blocks.count):
        block = PrunedBlock(
            blocks.block(number),
            [matrix for matrix in blocks.matrices if matrix.block == number],
            blocks.weights(number),
            dense,
            masks,
        )
        yield _recover_into(number, block, stream)
        stream.pass_on(block.module)


class Stream:
    """The hidden states of every example in front of the next block, and the block's other arguments."""

    def __init__(self, hidden: list[Tensor], others: Sequence[BlockArgs]) -> None:
        self._hidden, self._others = hidden, others

    @property
    def held_out(self) -> list[int]:
        return [number for number in range(len(self._hidden)) if self._judges(number)]

    @property
    def solved_on(self) -> list[int]:
        return [number for number in range(len(self._hidden)) if not self._judges(number)]

    @staticmethod
    def _judges(number: int) -> bool:
        return number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1

    def input(self, number: int) -> Tensor:
        return self._hidden[number]

    @torch.no_grad()
    def output(self, block: nn.Module, number: int) -> Tensor:
        """What a block computes of an example: (1, T, hidden)."""
        heartbeat()
        arguments, named = self._others[number]
        computed: Any = block(self._hidden[number], *arguments, **named)
        output: Tensor = computed[0] if isinstance(computed, tuple) else computed
        return output

    def pass_on(self, block: nn.Module) -> None:
        """Let what a block computes take the place of what it was given."""
        for number in range(len(self._hidden)):
            self._hidden[number] = self.output(block, number)


@dataclass(frozen=True)
class PrunedBlock:
    """A block whose matrices are pruned. Writing into `weights` writes into `module`."""

    module: nn.Module
    matrices: Sequence[Matrix]
    weights: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]

    def write(self, weights: Mapping[str, Tensor]) -> None:
        for name, own in self.weights.items():
            own.copy_(weights[name])

    def stages(self) -> Iterator[list[Matrix]]:
        """Its matrices in the order in which the block computes them; those of a stage do not read each other."""
        order = list(dict.fromkeys(INPUTS.values()))
        at = {matrix.name: order.index(INPUTS[matrix.role]) for matrix in self.matrices}
        for _, stage in groupby(sorted(self.matrices, key=lambda m: at[m.name]), key=lambda m: at[m.name]):
            yield list(stage)


def _recover_into(number: int, block: PrunedBlock, stream: Stream) -> BlockRecovery:
    pruned = {name: weight.clone() for name, weight in block.weights.items()}
    block.write(block.dense)
    targets = {example: stream.output(block.module, example) for example in stream.held_out}
    block.write(pruned)
    before = _closeness(block.module, stream, targets)
    for stage in block.stages():
        grams = _grams(block.module, stage, stream)
        for matrix in stage:
            if matrix.input_key in grams:
                _solve_into(block, matrix, grams[matrix.input_key])
    after = _closeness(block.module, stream, targets)
    is_accepted = after.is_within(before)
    if not is_accepted:
        block.write(pruned)
    return BlockRecovery(number, before, after, is_accepted)


def _solve_into(block: PrunedBlock, matrix: Matrix, damped: Tensor) -> None:
    heartbeat()
    own = block.weights[matrix.name]
    dense, mask = (tensors[matrix.name].to(own.device) for tensors in (block.dense, block.masks))
    solved = solve(matrix.oriented(own), matrix.oriented(dense), matrix.oriented(mask), damped)
    own.copy_(matrix.oriented(solved))


class _ReachedError(Exception):
    """The matrices of a stage were given their inputs."""


def _grams(block: nn.Module, stage: Sequence[Matrix], stream: Stream) -> dict[InputKey, Tensor]:
    """{input: X Xᵀ + λ} of what the matrices of a stage read, without the experts that no example reaches.

    What the block computes after the stage is left out.
    """
    with recorded(block, stage, wants_hessians=True) as inputs, _ended_before(block, stage[0]):
        for example in stream.solved_on:
            try:
                stream.output(block, example)
            except _ReachedError:
                continue
    return {source: damp_into(sums.products) for source, sums in inputs.items() if sums.products is not None}


@contextmanager
def _ended_before(block: nn.Module, matrix: Matrix) -> Iterator[None]:
    def reached(layer: nn.Module, arguments: Any) -> None:
        raise _ReachedError

    layer = block.get_submodule(matrix.layer if matrix.expert is None else "mlp.experts")
    hook = layer.register_forward_pre_hook(reached)
    try:
        yield
    finally:
        hook.remove()


def _closeness(block: nn.Module, stream: Stream, targets: Mapping[int, Tensor]) -> Closeness:
    errors, moves = [], []
    for example, target in targets.items():
        errors.append(_squared_distances(stream.output(block, example), target))
        moves.append(_squared_distances(stream.input(example), target))
    error, moved = torch.cat(errors).double(), torch.cat(moves).double().clamp_min(TINY)
    return Closeness(float(error.sum() / moved.sum()), float((error / moved).mean()))


def _squared_distances(computed: Tensor, target: Tensor) -> Tensor:
    """‖x - y‖² of each token, in float32: (tokens,)."""
    return (computed.float() - target).square().sum(dim=-1).flatten()
