"""Resources that a trial holds from its start to its end, by its model, task, mode and backend.

| backend | holds |
| --- | --- |
| torch | `threads` CPU, `gpus_per_trial` GPU: as set, or the fraction that finished runs of its kind needed |
| cerebras | `threads` CPU, `scoring_gpus` GPU, one CS3_TRIAL; one CS3 more while it trains (trainables/cs3.py) |

A trial that ran out of memory holds all CPUs of a node, and a whole GPU if it holds one at all: it is alone there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_sparse.config import CS3, CS3_TRIAL, SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run

MEMORY_MARGIN = 1.2
"""Room above the most that a finished run used: fragments, and examples longer than its own."""
CONTEXT_BYTES = 1 << 30
"""A process takes so much of a GPU before it allocates anything."""

ACCELERATOR_TYPE = "accelerator_type:"
"""Ray's resource of a node for its kind of GPU, before the kind: one, however many GPUs it has."""
OF_THIS_KIND = 0.001
"""Of that resource, for as many trials as there may be."""
MOST_TOGETHER = 8
"""Trials on one GPU: more of them wait for each other's computing."""

Resources = dict[str, float]


def available_cores() -> int:
    """The CPU cores that this process may use: a container or a job's allocation may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fits(needed: Mapping[str, float], free: Mapping[str, float]) -> bool:
    """Whether there is as much of everything; fractions of a GPU add up to one but for rounding."""
    return all(amount <= free.get(name, 0) + 1e-6 for name, amount in needed.items())


class Placement:
    """Decides what each trial of a sweep holds. It learns from the memory of finished runs, and from those that had too
    little.

    nodes: the resources of each node that is alive.
    """

    def __init__(self, config: SweepConfig, nodes: Callable[[], Sequence[Mapping[str, float]]]) -> None:
        self._config, self._nodes = config, nodes
        self._needed: dict[tuple[str, ...], float] = {}
        self._alone: set[str] = set()
        self._kinds: Mapping[tuple[str, str], str] = {}

    def keep_on(self, kinds: Mapping[tuple[str, str], str]) -> None:
        """Place runs of each (model, task) on its kind of GPU, by the name that Ray gives it."""
        self._kinds = kinds

    def queue(self, run: Run) -> str:
        """The trials that wait for the same hardware as a run, by name."""
        kind = self._kind_of_gpu(run)
        return f"{run.cell.backend} {kind}" if kind else run.cell.backend

    def _kind_of_gpu(self, run: Run) -> str | None:
        return None if run.cerebras else self._kinds.get((run.cell.model, run.cell.task))

    def resources(self, run: Run) -> Resources:
        """By Ray's names. A kind of run whose memory was not measured yet takes a whole GPU."""
        held: Resources = {"CPU": self._config.protocol.threads}
        if run.cerebras is not None:
            held |= {CS3_TRIAL: 1, "GPU": self._config.cerebras.scoring_gpus}
        elif self._config.gpus_per_trial is None:
            held["GPU"] = gpu_share(self._needed.get(_kind(run), 1.0))
        else:
            held["GPU"] = self._config.gpus_per_trial
        if kind := self._kind_of_gpu(run):
            held[f"{ACCELERATOR_TYPE}{kind}"] = OF_THIS_KIND
        held = {name: amount for name, amount in held.items() if amount}
        return self._whole_node(held) if run.run_id in self._alone else held

    def learn(self, run: Run, record: Record | None) -> None:
        """Take note of the memory that a finished run needed."""
        needed = needed_fraction(record.measured) if record else None
        if needed is not None:
            self._needed[_kind(run)] = max(needed, self._needed.get(_kind(run), 0.0))

    def give_more(self, run: Run) -> bool:
        """Let a run that was out of memory have a node for itself; False if it had one."""
        if run.run_id in self._alone:
            return False
        self._alone.add(run.run_id)
        return True

    def is_alone(self, run: Run) -> bool:
        """Whether a run has a node for itself."""
        return run.run_id in self._alone

    def check_placeable(self, runs: Sequence[Run]) -> None:
        """Raise `InputError` if no single node can hold a trial, or if nothing can train it."""
        nodes = self._nodes()
        for run in {run.cell.backend: run for run in runs}.values():
            needed = self.resources(run)
            if not any(fits(needed, node) for node in nodes):
                has = "; ".join(describe_resources(node) for node in nodes) or "no node"
                raise InputError(
                    f"a trial of the backend {run.cell.backend} needs a node with {describe_resources(needed)}, "
                    f"Ray has {has}. "
                    f"Lower threads or gpus_per_trial, or start a node with these resources (docs/cluster.md)."
                )
            if run.cerebras and not any(node.get(CS3) for node in nodes):
                raise InputError(
                    f"the backend cerebras needs the Ray resource {CS3}, the cluster has none. Start a node with "
                    f"`ray start --resources='{{\"{CS3}\": 1}}'`; docs/cerebras.md says which."
                )

    def _whole_node(self, held: Resources) -> Resources:
        fitting = [node["CPU"] for node in self._nodes() if fits(held, node)]
        whole_gpu = {"GPU": 1.0} if "GPU" in held else {}
        return held | {"CPU": max(fitting, default=held["CPU"])} | whole_gpu


def trial_settings(run: Run, config: SweepConfig, folder: Path, placement: Placement) -> dict[str, Any]:
    """The settings that every trial is given, whoever starts it. folder: of the results."""
    return {
        "run": run.as_config(),
        "results_dir": str(folder.resolve()),
        "hang_seconds": config.hang_seconds,
        "deterministic": config.deterministic,
        "resources": placement.resources(run),
    }


def _kind(run: Run) -> tuple[str, ...]:
    """Runs of one kind need about the same memory: calibration, and what is trained, are of a method and a mode."""
    return run.cell.model, run.cell.task, run.cell.mode, run.cell.method


def needed_fraction(measured: Mapping[str, Any]) -> float | None:
    """The fraction of its GPU that a finished run needed, or None if it had none. The limit of a share counts what was
    reserved, which is more than what was allocated."""
    peaks = ("cell_peak_reserved_bytes", "cell_peak_memory_bytes", "peak_memory_bytes")
    total, peak = measured.get("gpu_memory_bytes"), next(filter(None, map(measured.get, peaks)), None)
    return None if not total or not peak else (MEMORY_MARGIN * peak + CONTEXT_BYTES) / total


def gpu_share(needed: float) -> float:
    """1/k for the largest k such that k trials fit one GPU, at most 8; Ray counts in ten-thousandths.

    A trial computes on one GPU: one that needs more takes all of it, and fails there.
    """
    return int(10_000 / max(1, min(int(1 / needed), MOST_TOGETHER))) / 10_000


def describe_resources(resources: Mapping[str, float]) -> str:
    """Name those of `resources` that a trial may hold, for people."""
    named = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU", CS3_TRIAL, CS3) if resources.get(name)]
    return ", ".join(named) or "nothing"
