"""The compiled graphs of a plan's trainings on Cerebras, and the lengths to which examples are padded for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tune_sparse.cerebras.graphs import (
    TOKEN_SECONDS_BY_WEIGHT,
    Block,
    Graph,
    bucket_seconds,
    cheapest_buckets,
    graph_of_run,
)
from tune_sparse.cerebras.job import longest_tokens, padded_tokens
from tune_sparse.data.splits import encode_training, load_splits
from tune_sparse.data.tasks import tasks_named
from tune_sparse.ledger.run import Run
from tune_sparse.models.architectures import pruned_weights
from tune_sparse.models.checkpoints import load_tokenizer
from tune_sparse.sweep.plan import Plan


@dataclass(frozen=True)
class PlannedGraphs:
    """The graph of each training on Cerebras, and why the lengths are what they are."""

    by_run: dict[str, Graph]
    lines: tuple[str, ...]

    def distinct(self, runs: Iterable[Run]) -> list[Graph]:
        """List the graphs of those of `runs` that Cerebras trains, each once."""
        return list(dict.fromkeys(self.by_run[run.run_id] for run in runs if run.run_id in self.by_run))


def plan_graphs(plan: Plan) -> PlannedGraphs:
    """Find the graph of each training of a plan on Cerebras: the same however many of them are done.

    Raises `InputError` for an example that is longer than every bucket that was asked for.
    """
    settings = plan.config.cerebras
    by_run: dict[str, Graph] = {}
    lines: list[str] = []
    runs = [run for run in plan.runs.values() if run.cerebras]
    for model in {run.cell.model: None for run in runs}:
        own = [run for run in runs if run.cell.model == model]
        longest = {task: _longest(plan, model, task) for task in {run.cell.task: None for run in own}}
        blocks = {task: _block(plan, [run for run in own if run.cell.task == task], n) for task, n in longest.items()}
        buckets = settings.bucket_tokens or cheapest_buckets(list(blocks.values()))
        tokens = {task: padded_tokens(n, buckets) for task, n in longest.items()}
        lines += _bucket_lines(model, blocks, tokens)
        by_run |= {run.run_id: graph_of_run(run, tokens[run.cell.task], settings.sparsity_annotation) for run in own}
    return PlannedGraphs(by_run, tuple(lines))


def _longest(plan: Plan, model: str, task: str) -> int:
    checkpoint = plan.checkpoints[model]
    protocol = plan.config.protocol.within(checkpoint.dims.max_positions)
    tokenizer = load_tokenizer(checkpoint.path)
    encoded = [
        example
        for part in tasks_named(task)
        for example in encode_training(
            tokenizer,
            part,
            load_splits(part, plan.examples.data_dir, protocol).train,
            protocol.max_tokens,
            protocol.n_train,
        )
    ]
    return longest_tokens(encoded)


def _block(plan: Plan, runs: Sequence[Run], longest: int) -> Block:
    dims = plan.checkpoints[runs[0].cell.model].dims
    examples = sum(run.protocol.steps * run.protocol.global_batch_size for run in runs)
    graphs = (graph_of_run(run, 0, plan.config.cerebras.sparsity_annotation) for run in runs)
    return Block(longest, frozenset(graphs), examples * pruned_weights(dims) * TOKEN_SECONDS_BY_WEIGHT)


def _bucket_lines(model: str, blocks: Mapping[str, Block], tokens: Mapping[str, int]) -> list[str]:
    """Say what sharing a length saves and costs."""
    lines = []
    for width in sorted(set(tokens.values())):
        own = {task: block for task, block in blocks.items() if tokens[task] == width}
        graphs = {replace(graph, tokens=width) for block in own.values() for graph in block.graphs}
        apart = sum(bucket_seconds([block], block.longest) for block in own.values())
        padding = sum((width - block.longest) * block.token_seconds for block in own.values())
        saved = apart - (bucket_seconds(list(own.values()), width) - padding)
        lines.append(
            f"{model}: {', '.join(own)} padded to {width} tokens: {len(graphs)} graphs, saves {saved / 3600:.3g} hours "
            f"of compiling, costs {padding / 3600:.3g} hours of padding (both estimated from a 7B model)"
        )
    return lines
