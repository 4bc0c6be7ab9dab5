"""A model's matrices pruned by one method, at several sparsities: one matrix in memory at a time.

Where the weights come from decides what is read: a mapping of tensors in memory, or `TensorFiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby, pairwise

import torch
from torch import Tensor

from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.models.architectures import Matrix, architecture_named
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.safetensors_io import TensorFiles
from tune_sparse.pruning import allocation
from tune_sparse.pruning.allocation import Counts
from tune_sparse.pruning.calibration import (
    Blocks,
    CalibrationStats,
    InputKey,
    InputStats,
    calibrate_blockwise,
    gradient_sums,
)
from tune_sparse.pruning.masks import (
    channel_mask,
    group_norms,
    group_parts,
    keep_highest,
    kept_channels,
    structured_counts,
)
from tune_sparse.pruning.methods import GROUPS, Method, method_named
from tune_sparse.pruning.scores import SCORES, ScoreInputs
from tune_sparse.pruning.sparsegpt import inverse_factor, sparsegpt
from tune_sparse.pruning.survival_map import group_survival_map, row_survival_map, survival_map
from tune_sparse.watchdog import heartbeat

NO_STATISTICS = CalibrationStats()


@dataclass(frozen=True)
class Prunable:
    """The matrices of a model that are pruned. weights may read each tensor when it is asked for."""

    matrices: Sequence[Matrix]
    weights: Mapping[str, Tensor]
    """by checkpoint name, in the checkpoint's layout"""
    shapes: Mapping[str, tuple[int, ...]]
    dims: ModelDims

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], dims: ModelDims) -> Prunable:
        """Find the prunable matrices among the tensors of a checkpoint of these dims."""
        matrices = architecture_named(dims.architecture).matrices(weights)
        if isinstance(weights, TensorFiles):
            return cls(matrices, weights, weights.shapes, dims)
        return cls(matrices, weights, {name: tuple(weight.shape) for name, weight in weights.items()}, dims)

    @property
    def sizes(self) -> dict[str, int]:
        """{matrix: weights}, in the order of the blocks."""
        return {matrix.name: torch.Size(self.shapes[matrix.name]).numel() for matrix in self.matrices}


@dataclass(frozen=True)
class PrunedMatrix:
    """One matrix at every level, each computed when it is asked for."""

    name: str
    dense: Callable[[], Tensor]
    keep: Callable[[int], Tensor]
    """level -> keep-mask in the checkpoint's layout, bool"""
    weight: Callable[[int], Tensor]
    """level -> weight with its zeros, in the checkpoint's layout and dtype"""
    levels: Tensor | None = None
    """Levels that each weight survives, uint8, where the masks are nested by construction."""


def prune(
    method: str,
    model: Prunable,
    sparsities: Sequence[float],
    seed: int = 0,
    statistics: CalibrationStats = NO_STATISTICS,
) -> Iterator[PrunedMatrix]:
    """Every matrix pruned to ascending sparsities, block after block, by a method that updates no weights.

    Raises `InputError` for a method or sparsity that makes no sense here, or a layer that would lose everything.
    """
    job = Job.from_name(method, model, sparsities, seed, statistics)
    assert not job.method.updates_weights
    for _, block in groupby(model.matrices, key=lambda matrix: matrix.block):
        yield from job.prune_block(list(block), statistics)


def prune_blockwise(
    method: str,
    model: Prunable,
    blocks: Blocks,
    examples: Sequence[Encoded],
    sparsities: Sequence[float],
    seed: int = 0,
    statistics: CalibrationStats = NO_STATISTICS,
    sequential: bool = False,
) -> Iterator[PrunedMatrix]:
    """As `prune`, with the inputs of each block measured just before it is pruned.

    `sequential`, for one sparsity: each block is given what the blocks pruned before it compute, and `blocks` keep
    the pruned weights.
    """
    assert not sequential or len(sparsities) == 1
    job = Job.from_name(method, model, sparsities, seed, statistics)
    for number, inputs in calibrate_blockwise(blocks, examples, job.method.updates_weights, sequential):
        here = replace(statistics, norms=statistics.norms | {source: sums.norms for source, sums in inputs.items()})
        matrices = [matrix for matrix in model.matrices if matrix.block == number]
        into = blocks.weights(number) if sequential else {}
        yield from map(partial(_keep_in, into), job.prune_block(matrices, here, inputs))


def _keep_in(weights: Mapping[str, Tensor], pruned: PrunedMatrix) -> PrunedMatrix:
    """Write a pruned weight into its block, where the block is among those that keep it."""
    if pruned.name in weights:
        weights[pruned.name].copy_(pruned.weight(0))
    return pruned


@dataclass(frozen=True)
class Job:
    """A method applied to a model: what is settled before the first matrix."""

    method: Method
    model: Prunable
    sparsities: Sequence[float]
    seed: int
    counts: Counts

    @classmethod
    def from_name(
        cls, name: str, model: Prunable, sparsities: Sequence[float], seed: int, statistics: CalibrationStats
    ) -> Job:
        method = method_named(name)
        assert list(sparsities) == sorted(sparsities)
        check_method_sparsities(name, model.dims, sparsities)
        job = cls(method, model, sparsities, seed, {})
        if method.pattern != "element-wise":
            return job
        if method.allocation == "global":
            by_name = {matrix.name: matrix for matrix in model.matrices}
            counts = allocation.global_order(
                model.sizes, sparsities, lambda name: job.scores(by_name[name], statistics)
            )
        elif method.allocation == "owl":
            counts = allocation.owl(model.matrices, model.sizes, sparsities, statistics.outliers)
        elif method.allocation == "erk":
            counts = allocation.erk({name: model.shapes[name] for name in model.sizes}, sparsities)
        else:
            counts = allocation.uniform(model.sizes, sparsities)
        return replace(job, counts=counts)

    def scores(self, matrix: Matrix, statistics: CalibrationStats) -> Tensor:
        """Importance of each weight, in the checkpoint's layout; up to the sign, which `survival_map` ignores."""
        heartbeat()
        if self.method.score == "magnitude" and self.method.pattern not in GROUPS:
            return self.model.weights[matrix.name]
        weight = matrix.oriented(self.model.weights[matrix.name])
        return matrix.oriented(oriented_scores(self.method.score, matrix, weight, self.seed, statistics)).contiguous()

    def prune_block(
        self,
        matrices: Sequence[Matrix],
        statistics: CalibrationStats,
        inputs: Mapping[InputKey, InputStats] | None = None,
    ) -> Iterator[PrunedMatrix]:
        """inputs: with Hessians, for a method that updates weights."""
        if self.method.pattern == "structured":
            yield from self._structured(matrices, statistics)
        elif self.method.updates_weights:
            assert inputs is not None
            for source, together in groupby(matrices, key=lambda matrix: matrix.input_key):
                sums = inputs[source]
                yield from self._updated(together, inverse_factor(sums.take_hessian()), sums.dead)
        else:
            yield from (self._elementwise(matrix, statistics) for matrix in matrices)

    def _elementwise(self, matrix: Matrix, statistics: CalibrationStats) -> PrunedMatrix:
        weight = self.model.weights[matrix.name]
        found = self.scores(matrix, statistics)
        if self.method.pattern in GROUPS:
            kept, group = GROUPS[self.method.pattern]
            levels = matrix.oriented(group_survival_map(matrix.oriented(found), group, kept))
        elif SCORES[self.method.score].by_row:
            by_row = row_survival_map(matrix.oriented(found), self.counts[matrix.name], matrix.transposed)
            levels = matrix.oriented(by_row)
        else:
            levels = survival_map(found, self.counts[matrix.name])
        nested = levels.contiguous()
        return PrunedMatrix(
            matrix.name, lambda: weight, lambda level: nested > level, lambda level: weight * (nested > level), nested
        )

    def _updated(self, matrices: Iterable[Matrix], factor: Tensor, dead: Tensor) -> Iterator[PrunedMatrix]:
        """Matrices with one input, which share its factor."""
        return (self._updated_matrix(matrix, factor, dead) for matrix in matrices)

    def _updated_matrix(self, matrix: Matrix, factor: Tensor, dead: Tensor) -> PrunedMatrix:
        weight = self.model.weights[matrix.name]

        @cache
        def at(level: int) -> tuple[Tensor, Tensor]:
            heartbeat()
            new, keep = sparsegpt(
                matrix.oriented(weight),
                factor,
                self.counts[matrix.name][level] if self.counts else 0,
                GROUPS.get(self.method.pattern),
                matrix.transposed,
                dead,
            )
            return matrix.oriented(new).to(weight.dtype).contiguous(), matrix.oriented(keep).contiguous()

        return PrunedMatrix(matrix.name, lambda: weight, lambda level: at(level)[1], lambda level: at(level)[0])

    def _structured(self, matrices: Sequence[Matrix], statistics: CalibrationStats) -> Iterator[PrunedMatrix]:
        """Whole key/value groups and feed-forward channels go, the same number in every block and expert."""
        dims = self.model.dims
        lost = [structured_counts(dims, sparsity) for sparsity in self.sparsities]
        # An expert's channels are its own; the heads belong to the block.
        for _, part in groupby(matrices, key=lambda m: (m.expert, m.is_attention)):
            together = list(part)
            norms = group_norms(*(self._group_scores(matrix, statistics) for matrix in together))
            keeps = [keep_highest(norms, counts[not together[0].is_attention]) for counts in lost]
            for matrix in together:
                yield self._of_channels(matrix, [kept_channels(matrix, dims, keep, keep) for keep in keeps])

    def _group_scores(self, matrix: Matrix, statistics: CalibrationStats) -> Tensor:
        weight = matrix.oriented(self.model.weights[matrix.name])
        if self.method.score != "magnitude":  # a norm ignores the sign
            weight = oriented_scores(self.method.score, matrix, weight, self.seed, statistics)
        return group_parts(matrix, self.model.dims, weight)

    def _of_channels(self, matrix: Matrix, channels: Sequence[Tensor]) -> PrunedMatrix:
        def keep(level: int) -> Tensor:
            return channel_mask(matrix, self.model.dims, channels[level]).contiguous()

        weights, name = self.model.weights, matrix.name
        nested = all(bool((sparser <= denser).all()) for denser, sparser in pairwise(channels))
        survived = torch.stack(list(channels)).sum(dim=0).to(torch.uint8)
        levels = channel_mask(matrix, self.model.dims, survived).contiguous() if nested else None
        return PrunedMatrix(name, lambda: weights[name], keep, lambda level: weights[name] * keep(level), levels)


def oriented_scores(score: str, matrix: Matrix, weight: Tensor, seed: int, statistics: CalibrationStats) -> Tensor:
    """Importance of each weight of a matrix: (O, I), as `weight`."""
    gradients = statistics.gradients.get(matrix.name)
    compute = SCORES[score].compute
    assert compute is not None, score
    inputs = ScoreInputs(
        matrix.name,
        seed,
        input_norms=statistics.norms.get(matrix.input_key),
        gradients=None if gradients is None else matrix.oriented(gradients).to(weight.device),
    )
    return compute(weight, inputs)


def check_method_sparsities(name: str, dims: ModelDims, sparsities: Iterable[float]) -> None:
    """Raise `InputError` for a method that cannot prune a model of this shape to one of the sparsities."""
    method = method_named(name)
    for sparsity in sparsities:
        method.check_sparsity(name, sparsity)
        if method.pattern == "structured":
            structured_counts(dims, sparsity)
    _, group = GROUPS.get(method.pattern, (1, 1))
    for width in (dims.hidden_size, dims.query_rows, dims.intermediate_size):
        if width % group:
            raise InputError(
                f"{method.pattern} needs rows of a multiple of {group} weights, the model has rows of {width}. "
                "Choose another pattern."
            )


def needs_blockwise(method: str, sequential: bool) -> bool:
    """True where a method prunes each block as the calibration examples reach it, not from statistics alone."""
    chosen = method_named(method)
    return chosen.updates_weights or (sequential and chosen.needs.input_norms)


def measured(
    methods: Iterable[Method], model: Prunable, blocks: Blocks, examples: Sequence[Encoded]
) -> CalibrationStats:
    """Measure what the scores of `methods` need, on the dense model. Gradients need all of it in memory."""
    needs = list(methods)
    gradients: dict[str, Tensor] = {}
    norms: dict[InputKey, Tensor] = {}
    if any(method.needs.gradients for method in needs):
        gradients = gradient_sums(blocks.whole(), examples, model.matrices)
    if any(method.needs.input_norms for method in needs):
        for _, inputs in calibrate_blockwise(blocks, examples):
            norms |= {source: sums.norms for source, sums in inputs.items()}
    owl = any(method.allocation == "owl" for method in needs)
    return CalibrationStats(norms, gradients, measured_outliers(model, norms) if owl else ())


def measured_outliers(model: Prunable, norms: Mapping[InputKey, Tensor]) -> tuple[float, ...]:
    """OWL's fraction of outliers of each block, from the norms of the dense model's inputs."""
    statistics = CalibrationStats(norms=dict(norms))

    def block_scores(block: Sequence[Matrix]) -> Iterator[Tensor]:
        for matrix in block:
            weight = matrix.oriented(model.weights[matrix.name])
            yield oriented_scores("wanda", matrix, weight, 0, statistics)

    blocks = [list(block) for _, block in groupby(model.matrices, key=lambda matrix: matrix.block)]
    return tuple(allocation.outlier_fraction(partial(block_scores, block)) for block in blocks)
