"""A plan of a search: one cell to adapt, checked before anything runs."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from tune_sparse.config import FLOPS_TOKENS, SweepConfig
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import tasks_named
from tune_sparse.errors import InputError
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.identity import hash_json
from tune_sparse.ledger.run import Run
from tune_sparse.lora.rank_space import Ranks, Space, SuperAdapter, check_space
from tune_sparse.models.architectures import architecture_named
from tune_sparse.models.dims import ModelDims
from tune_sparse.search.config import SearchConfig
from tune_sparse.sweep.plan import Plan, make_plan
from tune_sparse.sweep.preparation import prepare
from tune_sparse.sweep.protocol_in_use import ProtocolInUse, protocol_in_use
from tune_sparse.sweep.resources import available_cores
from tune_sparse.training.budgets import cpu_budgets


@dataclass(frozen=True)
class SearchPlan:
    """A search that was found sound."""

    config: SearchConfig
    run: Run
    """of the super-adapter"""
    dims: ModelDims
    search_id: str
    sizes: dict[str, tuple[int, int]]
    """{adapted matrix: (O, I)}"""
    selection_examples: int
    """that a candidate answers"""
    protocol: ProtocolInUse

    @property
    def space(self) -> Space:
        return self.config.space

    def parameters(self, ranks: Ranks) -> int:
        return self.space.parameters(ranks, self.sizes)

    def cost(self, ranks: Ranks) -> float:
        """The objective that a search minimises. inference_flops: of the adapters, at 2 a parameter and token; those of
        the model itself are the same for every candidate."""
        per_parameter = 2 * FLOPS_TOKENS if "inference_flops" in self.config.objectives else 1
        return per_parameter * self.parameters(ranks)

    def plain_run(self, parameters: int) -> Run:
        """A plain LoRA of the same modules, s and protocol, of the rank whose size is nearest to `parameters`."""
        of_rank_one = sum(sum(size) for size in self.sizes.values())
        rank, protocol = max(1, round(parameters / of_rank_one)), self.run.protocol
        alpha = protocol.lora_alpha / protocol.lora_rank * rank
        plain = SuperAdapter(Space.uniform(self.space.modules, rank))
        return replace(self.run, protocol=replace(protocol, lora_rank=rank, lora_alpha=alpha), super_adapter=plain)


def plan_search(config: SearchConfig) -> SearchPlan:
    """Check everything that would stop a search later. Raises `InputError`."""
    _check_task(config.sweep.tasks[0])
    return _plan(config, make_plan(config.sweep))


def prepare_search(config: SearchConfig) -> SearchPlan:
    """Plan a search and make it ready to run, as `prepare` does a sweep."""
    _check_task(config.sweep.tasks[0])
    return _plan(config, prepare(config.sweep))


def _check_task(name: str) -> None:
    [task] = tasks_named(name) if "+" not in name else [None]
    if not isinstance(task, PromptTask):
        raise InputError(
            f"a search maximises the accuracy of one task with questions, got {name!r}. "
            "Choose a single task such as boolq."
        )


def _plan(config: SearchConfig, plan: Plan) -> SearchPlan:
    if len(plan.runs) != 1:
        raise InputError("a search adapts one cell. Name one model, task, method, sparsity, mode and seed.")
    if config.sweep.protocol.train_also:
        raise InputError(
            "a search keeps no weights beside the adapters of its sub-adapters, so train_also must be empty, got "
            f"{' '.join(config.sweep.protocol.train_also)}. Leave it out."
        )
    [run], [checkpoint] = plan.runs.values(), plan.checkpoints.values()
    matrices = architecture_named(checkpoint.dims.architecture).expected(checkpoint.dims)
    check_space(config.space, {matrix.module for matrix in matrices}, config.sweep.protocol.lora_rank)
    _check_workers(config.sweep, run, checkpoint.dims)
    run = replace(run, super_adapter=config.super_adapter)
    identity = hash_json([run.identity, config.candidate_settings()])
    search_id = f"{run.run_id}_{config.sampler}_{identity[:8]}"
    adapted = {m.name: m.size(checkpoint.dims) for m in matrices if m.module in config.space.modules}
    selection = plan.examples.counts[config.sweep.tasks[0]].selection
    protocol = protocol_in_use(config.sweep, plan.examples)
    return SearchPlan(config, run, checkpoint.dims, search_id, adapted, selection, protocol)


def _check_workers(sweep: SweepConfig, run: Run, dims: ModelDims) -> None:
    if sweep.workers is None or "RAY_ADDRESS" in os.environ or sweep.gpus_per_trial != 0:
        return
    cell = CellMemory(dims, run.cell.mode, run.cell.method, run.protocol)
    each = cell.host_bytes(cpu_budgets(cell.longest), on_gpu=False)
    fitting = min(available_cores() // sweep.protocol.threads, psutil.virtual_memory().total // each)
    if sweep.workers > fitting:
        raise InputError(
            f"a worker of a search needs {sweep.protocol.threads} cores and {each / 1e9:.1f} GB, so this machine holds "
            f"{fitting}, got {sweep.workers} workers. Lower workers."
        )


def config_json(plan: SearchPlan) -> dict[str, Any]:
    """The content of a search's `config.json`."""
    config = plan.config
    return {
        "search_id": plan.search_id,
        "super_adapter_run": plan.run.run_id,
        **asdict(plan.run.cell),
        "space_name": config.space_name,
        "space": asdict(config.space),
        "sampling": config.sampling,
        "trials": config.trials,
        **config.candidate_settings(),
        "maximal_parameters": plan.parameters(plan.space.maximal(plan.dims.num_layers)),
        "dimensions": plan.space.dimensions(plan.dims.num_layers),
        "started": time.time(),
    }
