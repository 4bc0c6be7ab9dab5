"""The compiled graph of a training: trainings that the compiler cannot tell apart share one, which takes about an hour.

It holds the shapes, the operations and the annotated sparsities. Weights, masks, examples, their order and seeds are
inputs of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from tune_sparse.cerebras.job import job_protocol
from tune_sparse.cerebras.sparsity import ChangingMasks
from tune_sparse.config.cerebras import EXACT, LEFT_OUT
from tune_sparse.identity import hash_json
from tune_sparse.ledger.run import Run
from tune_sparse.modes import MODES

STATE = ("seed", "steps", "learning_rate", "final_learning_rate", "warmup_steps")
"""Settings of a job that are no constants of its graph."""
COMPILE_SECONDS = 57.5 * 60
"""Of Llama-2-7B at a batch of 128, as public logs of ALCF's CS-3 have it. Of other models nothing is known."""
TOKEN_SECONDS_BY_WEIGHT = 1 / (32.0 * 4096 * 6.74e9)
"""Of a training on a CS-3: Llama-2-7B, 32 samples of 4,096 tokens a second, as ALCF's guide has it."""


@dataclass(frozen=True)
class Graph:
    """Everything on which the compiled graph of a training depends."""

    model: str
    trained: str
    """adapters, masked adapters, weights, or masked weights"""
    tokens: int
    """to which every example is padded"""
    annotation: float | str | None
    """the sparsity that the compiler is told; where each matrix has its own, what prunes them so"""
    protocol: str
    """a hash of the settings that are constants in it"""
    changing: ChangingMasks | None = None
    """how its masks change; None where they stay"""

    @property
    def operations(self) -> Hashable:
        """The same for graphs that differ in numbers alone."""
        algorithm = self.changing.algorithm if self.changing else None
        return replace(self, annotation=self.annotation is not None, changing=None), algorithm

    def summary(self) -> str:
        told = "" if self.annotation is None else f", annotated {self.annotation}"
        changed = "" if self.changing is None else f", masks changed by {self.changing.algorithm}"
        return f"{self.model}, {self.trained} trained, {self.tokens} tokens{told}{changed}"


def graph_of_run(run: Run, tokens: int, annotation: str) -> Graph:
    """The graph of a run whose examples are padded to `tokens`; annotation: exact, rounded or none."""
    mode, is_pruned = MODES[run.cell.mode], run.cell.sparsity > 0
    is_masked = is_pruned and (mode.masks_update or not mode.has_adapter)
    what = "adapters" if mode.has_adapter else "weights"
    told = None if annotation == LEFT_OUT or not is_pruned else run.cell.sparsity
    constants = {name: value for name, value in job_protocol(run.protocol, 0).items() if name not in STATE}
    return Graph(
        run.cell.model,
        f"masked {what}" if is_masked else what,
        tokens,
        run.pruning_id or f"{run.cell.method} {told}" if told and annotation == EXACT else told,
        hash_json(constants),
        ChangingMasks.from_run(run),
    )


@dataclass(frozen=True)
class Block:
    """The trainings of one model on one task."""

    longest: int
    """tokens of the longest example"""
    graphs: frozenset[Graph]
    """whatever their tokens"""
    token_seconds: float
    """that one more token in each example of each training takes"""


def bucket_seconds(blocks: Sequence[Block], tokens: int) -> float:
    """Seconds of compiling the graphs of `blocks`, all padded to `tokens`, and of training on the padding."""
    graphs = {replace(graph, tokens=tokens) for block in blocks for graph in block.graphs}
    padding = sum((tokens - block.longest) * block.token_seconds for block in blocks)
    return COMPILE_SECONDS * len(graphs) + padding


def cheapest_buckets(blocks: Sequence[Block]) -> tuple[int, ...]:
    """The lengths to which blocks of one model are padded, rising, so that compiling and padding take the least time.

    Blocks of neighbouring lengths share one: what is padded at all is padded to the longest of its bucket.
    """
    rising = sorted(blocks, key=lambda block: block.longest)

    @cache
    def cheapest(start: int) -> tuple[float, tuple[int, ...]]:
        if start == len(rising):
            return 0.0, ()
        ways = []
        ends = [n for n in range(start + 1, len(rising)) if rising[n - 1].longest < rising[n].longest]
        for end in (*ends, len(rising)):
            longest, (seconds, buckets) = rising[end - 1].longest, cheapest(end)
            ways.append((bucket_seconds(rising[start:end], longest) + seconds, (longest, *buckets)))
        return min(ways)

    return cheapest(0)[1]
