"""A forecast of the time and disk of a plan's missing runs, from those of it that were measured."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from tune_sparse.cerebras.graphs import COMPILE_SECONDS, Graph
from tune_sparse.config import Cell, SweepConfig
from tune_sparse.config.protocol import CALIBRATION_SETTINGS
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.models.architectures import pruned_weights
from tune_sparse.sweep.cards import gpus_asked
from tune_sparse.sweep.chains import Chains
from tune_sparse.sweep.graphs import plan_graphs
from tune_sparse.sweep.plan import Plan, checkpoint_bytes, host_bytes, pruning_bytes
from tune_sparse.sweep.progress import duration
from tune_sparse.sweep.resources import available_cores

TASK = ("backend", "model", "task")
SETTINGS = "settings"
"""Among the names of a group: what runs share of `COSTLY`."""
COSTLY = ("global_batch_size", "train_also", "lora_rank", "packing", "recover", *CALIBRATION_SETTINGS)
"""Settings that may be axes and that change what a run takes, beside its steps."""
KIND = (*TASK, "mode", "schedule")
TIME_GROUPS = ((*KIND, SETTINGS), KIND, (*TASK, "mode"), TASK, ("backend", "model"))
"""A run takes the median of the first of these that has a measured run; never of another backend or model."""
DISK_GROUPS = ((*TASK, "mode", SETTINGS), ("backend", "model", "mode", SETTINGS))
"""The bytes of a run depend on its mode before all; without a measured run its bound is taken."""


@dataclass(frozen=True)
class RunCost:
    """The time and disk that one run took, or the median of several."""

    trial_seconds: float
    cpu_seconds: float
    gpu_seconds: float
    """of those that its trial held"""
    cs3_seconds: float
    compile_seconds: float
    """of the seconds of CS-3 systems"""
    scoring_seconds: float
    """in which a CPU prunes and scores what a CS-3 trains, because the trial holds no GPU"""
    disk_bytes: float
    training_fraction: float = 0.0
    """of the trial's seconds"""

    def with_training(self, ratio: float) -> RunCost:
        """The same with so many times as many examples trained on, beside which what does not train takes as long."""
        if ratio == 1:
            return self
        longer = 1 + self.training_fraction * (ratio - 1)
        return replace(
            self,
            trial_seconds=self.trial_seconds * longer,
            cpu_seconds=self.cpu_seconds * longer,
            gpu_seconds=self.gpu_seconds * longer,
            training_fraction=self.training_fraction * ratio / longer,
        )


@dataclass(frozen=True)
class Forecast:
    """Time and disk of the missing runs; those without a measured one to go by are left out of all seconds."""

    runs: int
    cpu_seconds: float
    gpu_seconds: float
    cs3_seconds: float
    compile_seconds: float
    """of the seconds of CS-3 systems"""
    graphs: int
    """that the missing runs have to compile for a CS-3, each once"""
    graph_seconds: float | None
    """that this takes on the clock, None where no run was compiled yet"""
    compiles_first: bool
    """before the first training, with no CS-3 held: beside `cs3_seconds`"""
    scoring_seconds: float
    """in which a CPU prunes and scores what a CS-3 trains, because its trials hold no GPU"""
    wall_seconds: float | None
    """None where it is not known how many trials run at once"""
    disk_bytes: int
    pruning_bytes: int
    """Prunings of the missing runs that are not stored yet, shared by the modes of a cell: beside `disk_bytes`."""
    checkpoint_bytes: int
    """An unfinished training of the mode with the largest, while it runs: beside `disk_bytes`."""
    host_bytes: int
    """A trial takes at most so much of its host's memory."""
    bounded: int
    """Runs whose bytes are a bound, not a measurement."""
    by_group: dict[str, int]
    """{what runs share with those whose median they take: runs}"""
    unmeasured: dict[str, int]
    """{backend, model and task: runs} that are left out"""

    def lines(self) -> list[str]:
        """For people."""
        bound = f", a bound for {self.bounded} of the runs: none of their model and mode was measured"
        lines = [f"Disk: about {self.disk_bytes / 1e6:.0f} MB" + (bound if self.bounded else "")]
        lines.append(
            f"  and {self.pruning_bytes / 1e6:.0f} MB of prunings that are made once, and up to "
            f"{self.checkpoint_bytes / 1e6:.0f} MB for each unfinished training"
        )
        lines.append(f"Memory of the host: up to {self.host_bytes / 1e9:.1f} GB for each trial")
        if self.by_group:
            lines.append(f"Time of {sum(self.by_group.values())} of {self.runs} runs: {self._time()}")
        if self.graphs:
            lines.append(self._compiling())
        if self.scoring_seconds:
            lines.append(
                f"  of it {duration(self.scoring_seconds)} in which a CPU prunes and scores what a CS-3 trains: no GPU "
                "does it (--scoring-gpus)"
            )
        lines += [f"  {n} as the median of measured runs of the same {group}" for group, n in self.by_group.items()]
        unknown = "no run of {} was measured here: its {} missing runs have no forecast of time (--pilot measures one)"
        return lines + [f"  {unknown.format(group, n)}" for group, n in self.unmeasured.items()]

    def _compiling(self) -> str:
        when = "before the first training, with no CS-3 held" if self.compiles_first else "each when first trained"
        published = "" if self.graph_seconds else " if each takes as long as a published 7B"
        return (
            f"Graphs to compile for a CS-3, each once: {self.graphs} (--sparsity-annotation), {when} "
            f"(--compile-first), in {duration(self.graph_seconds or self.graphs * COMPILE_SECONDS)}{published}"
        )

    def _time(self) -> str:
        compiling = f" ({duration(self.compile_seconds)} of them compiling)" if self.compile_seconds else ""
        kinds = {"CPU": self.cpu_seconds, "GPU": self.gpu_seconds, "CS-3": self.cs3_seconds}
        hours = [f"{seconds / 3600:.3g} {kind}-hours" for kind, seconds in kinds.items() if seconds]
        clock = f"; {duration(self.wall_seconds)} on the clock" if self.wall_seconds else ""
        return ", ".join(hours) + compiling + clock


def forecast(plan: Plan, ledger: LedgerReader, missing: Sequence[Run]) -> Forecast:
    """Medians of the done runs of a plan, which have its protocol, for its missing ones."""
    measured = [
        (run, cost_of_run(run, record, ledger.run_folder(run.run_id), plan.config))
        for run in plan.runs.values()
        if (record := ledger.record(run.run_id)) and record.status == "done"
    ]
    timed, written = Medians(measured, TIME_GROUPS), Medians(measured, DISK_GROUPS)
    like = [(run, timed.nearest(run)) for run in missing]
    known = [(run, cost) for run, (_, cost) in like if cost]
    graphs = _missing_graphs(plan, ledger, missing)
    compiling = len(graphs) * max((cost.compile_seconds for _, cost in measured), default=0.0)
    held = 0.0 if plan.config.cerebras.compile_first else compiling
    disk = [written.nearest(run)[1] for run in missing]
    return Forecast(
        runs=len(missing),
        cpu_seconds=sum(cost.cpu_seconds for _, cost in known),
        gpu_seconds=sum(cost.gpu_seconds for _, cost in known),
        cs3_seconds=sum(cost.cs3_seconds - cost.compile_seconds for _, cost in known) + held,
        compile_seconds=held,
        graphs=len(graphs),
        graph_seconds=compiling / plan.config.cerebras.num_csx or None,
        compiles_first=plan.config.cerebras.compile_first,
        scoring_seconds=sum(cost.scoring_seconds for _, cost in known),
        wall_seconds=wall_seconds(known, plan.config),
        disk_bytes=round(
            sum(s.disk_bytes if s else plan.estimate_bytes(run) for run, s in zip(missing, disk, strict=True))
        ),
        pruning_bytes=pruning_bytes(plan, ledger, missing),
        checkpoint_bytes=checkpoint_bytes(plan, missing),
        host_bytes=host_bytes(plan, missing),
        bounded=disk.count(None),
        by_group=dict(Counter(", ".join(names) for _, (names, cost) in like if cost)),
        unmeasured=dict(Counter(" ".join(pilot_key(run.cell)) for run, (_, cost) in like if not cost)),
    )


def _missing_graphs(plan: Plan, ledger: LedgerReader, missing: Sequence[Run]) -> set[Graph]:
    """The graphs of the missing runs that no done run has had compiled for a CS-3."""
    if not any(run.cerebras and run.cerebras["target"] == "csx" for run in missing):
        return set()
    planned = plan_graphs(plan)
    done = [run for run in plan.runs.values() if ledger.is_done(run.run_id)]
    return set(planned.distinct(missing)) - set(planned.distinct(done))


def longest_first(plan: Plan, ledger: LedgerReader, runs: Sequence[Run]) -> list[Run]:
    """`runs` by the time that each is expected to take, with those that wait for it, so that no long one, and no chain
    of levels, is left to run alone at the end.

    Runs of one backend, model, task and mode stay together, and rarely let a worker change its model. Where some of
    these have no measured run to go by, the larger model counts as the longer.
    """
    seconds: dict[tuple[Any, ...], list[tuple[float, float]]] = {_values(run, KIND): [] for run in runs}
    for run in plan.runs.values():
        record = ledger.record(run.run_id)
        if record and record.status == "done":
            trial, training = (record.measured[f"{name}_seconds"] for name in ("trial", "train"))
            seconds.setdefault(_values(run, KIND), []).append((trial - training, training / trained_examples(run)))
    is_measured = all(seconds.values())

    def expected(run: Run) -> float:
        if is_measured:
            return statistics.median(rest + each * trained_examples(run) for rest, each in seconds[_values(run, KIND)])
        return pruned_weights(plan.checkpoints[run.cell.model].dims) * trained_examples(run)

    followers: dict[str, list[Run]] = {}
    for run in runs:
        if before := run.level_before:
            followers.setdefault(before.run_id, []).append(run)

    def through(run: Run) -> float:
        return expected(run) + max(map(through, followers.get(run.run_id, ())), default=0.0)

    return sorted(runs, key=through, reverse=True)


class Medians:
    """Medians of measured runs, by what they share, each run counted as if it trained on as many examples."""

    def __init__(self, measured: Iterable[tuple[Run, RunCost]], groups: Sequence[tuple[str, ...]]) -> None:
        members: dict[tuple[tuple[str, ...], tuple[Any, ...]], list[RunCost]] = {}
        known = list(measured)
        self._examples = trained_examples(known[0][0]) if known else 1
        for run, cost in known:
            for names in groups:
                alike = members.setdefault((names, _values(run, names)), [])
                alike.append(cost.with_training(self._examples / trained_examples(run)))
        self._groups = groups
        self._medians = {key: _median(cost) for key, cost in members.items()}

    def nearest(self, run: Run) -> tuple[tuple[str, ...], RunCost | None]:
        """Find the first group that has measured runs; returns what the run shares with them, and their median for its
        own number of examples."""
        for names in self._groups:
            if median := self._medians.get((names, _values(run, names))):
                return names, median.with_training(trained_examples(run) / self._examples)
        return (), None


def trained_examples(run: Run) -> int:
    return run.own_steps * run.protocol.global_batch_size


def _values(run: Run, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(_costly(run) if name == SETTINGS else getattr(run.cell, name) for name in names)


def _costly(run: Run) -> tuple[Any, ...]:
    return tuple(getattr(run.protocol, name) for name in COSTLY)


def _median(members: Sequence[RunCost]) -> RunCost:
    """Number by number."""
    return RunCost(*(statistics.median(values) for values in zip(*map(astuple, members), strict=True)))


def pilot_key(cell: Cell) -> tuple[str, ...]:
    """The kind of runs for which one pilot is run."""
    return cell.backend, cell.model, cell.task


def pilots(plan: Plan, ledger: LedgerReader, missing: Sequence[Run]) -> list[Run]:
    """The middle one of the missing runs, of those that wait for none, of each backend, model and task that has no
    measured run."""
    measured = {pilot_key(run.cell) for run in plan.runs.values() if ledger.is_done(run.run_id)}
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in filter(Chains(ledger, missing).is_ready, missing):
        groups.setdefault(pilot_key(run.cell), []).append(run)
    return [runs[len(runs) // 2] for key, runs in groups.items() if key not in measured]


def cost_of_run(run: Run, record: Record, folder: Path, config: SweepConfig) -> RunCost:
    """Compute what a done run took. A trial that did not record what it held counts as one that starts now."""
    measured, systems = record.measured, config.cerebras.num_csx
    held = measured.get("held", {"CPU": run.protocol.threads, "GPU": gpus_asked(config)})
    on_cs3 = run.cerebras is not None and run.cerebras["target"] == "csx"
    return RunCost(
        trial_seconds=measured["trial_seconds"],
        cpu_seconds=measured["trial_seconds"] * held.get("CPU", 0.0),
        gpu_seconds=measured["trial_seconds"] * held.get("GPU", 0.0),
        cs3_seconds=_cs3_seconds(measured) * systems if on_cs3 else 0.0,
        compile_seconds=(measured["compile_seconds"] or 0.0) * systems if on_cs3 else 0.0,
        scoring_seconds=measured["trial_seconds"] - _cs3_seconds(measured) if on_cs3 and not held.get("GPU") else 0.0,
        disk_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        training_fraction=measured["train_seconds"] / measured["trial_seconds"],
    )


def _cs3_seconds(measured: Mapping[str, Any]) -> float:
    """Compute how long a trial held its CS3: queue, compiling and programming stand beside the training."""
    before = ("queue_seconds", "compile_seconds", "programming_seconds")
    return float(measured["train_seconds"] + sum(measured.get(name) or 0.0 for name in before))


def wall_seconds(known: Sequence[tuple[Run, RunCost]], config: SweepConfig) -> float | None:
    """Each kind of trial in its own slots, all kinds at once, no less than the longest; None where nobody knows."""
    longest = max((cost.trial_seconds for _, cost in known), default=None)
    by_kind = [longest]
    for backend in {run.cell.backend for run, _ in known}:
        slots = trials_at_once(config, backend)
        seconds = sum(cost.trial_seconds for run, cost in known if run.cell.backend == backend)
        by_kind.append(seconds / slots if slots else None)
    return None if None in by_kind else max(value for value in by_kind if value is not None)


def trials_at_once(config: SweepConfig, backend: str) -> int | None:
    """How many trials of a backend run at once, or None where only a running cluster knows."""
    if backend == "cerebras":
        return None if "RAY_ADDRESS" in os.environ else config.cerebras.cs3 + 1
    if config.workers is not None:
        return config.workers
    if "RAY_ADDRESS" in os.environ:
        return None
    if gpus_asked(config):
        import torch

        return int(torch.cuda.device_count() / gpus_asked(config)) or None
    return max(1, available_cores() // config.protocol.threads)
