"""Every default of the system, once, with the rules that values must obey.

The same names serve the command line (`--models`, `--set steps=20`), a YAML file and Python:
`SweepConfig.from_names({"models": ["tiny-llama"], "steps": 20})`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from tune_sparse.config.axes import (
    Axes,
    Point,
    check_axes,
    explained,
    own_settings,
    points_of,
    settings_of,
    typed_axes,
)
from tune_sparse.config.budgets import BudgetOptions as BudgetOptions
from tune_sparse.config.cerebras import UNTRAINED_TARGETS
from tune_sparse.config.cerebras import Cerebras as Cerebras
from tune_sparse.config.early_stopping import EarlyStopping as EarlyStopping
from tune_sparse.config.options import converted, option, rule
from tune_sparse.config.presets import DEFAULT_PRESET, preset_settings
from tune_sparse.config.protocol import Protocol as Protocol
from tune_sparse.config.protocol import without_published
from tune_sparse.config.schedule_settings import ScheduleSettings as ScheduleSettings
from tune_sparse.config.schedule_settings import check_are_read, check_on_cerebras, check_schedules
from tune_sparse.config.spending import BudgetLimit, FindRule, check_spending
from tune_sparse.errors import InputError, unknown_name
from tune_sparse.modes import DENSE, MODES, SPARSE_ADAPTER_MODES
from tune_sparse.net import check_address
from tune_sparse.schedules import ITERATIVE, ONE_SHOT

LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "masked_lora_impl")
BACKENDS = ("torch", "cerebras")
BOTH, SPLIT = "both", "split"
"""As `backend`: each cell on each, or whole (model, task) blocks on one or the other."""
CS3 = "CS3"
"""A Ray resource, held while a training runs: one for each CS-3 training at a time."""
CS3_TRIAL = "CS3_TRIAL"
"""A Ray resource that a trial of the backend cerebras holds from its start to its end, also while it prunes and scores.
One more than there are CS3 keeps these busy, and other trials are never crowded out."""
FLOPS_TOKENS = 2048
"""The sequence length at which inference FLOPs are compared."""
SYNTHETIC, HUB = Path("synthetic"), Path("hub")
"""As a `data_dir`: examples come from the synthetic generator, or from the Hugging Face Hub. Neither is ever a default,
so that no model is trained on generated examples, and nothing is fetched, by oversight."""


def check_sparsities(sparsities: Iterable[float]) -> None:
    """Raise `InputError` unless all are fractions."""
    for sparsity in sparsities:
        rule(
            0 <= sparsity < 1,
            "a sparsity is the fraction of zeros, in [0, 1)",
            sparsity,
            f"Did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else "Give a fraction.",
        )


@dataclass(frozen=True)
class Cell:
    """One point of the matrix."""

    model: str
    task: str
    method: str
    sparsity: float
    mode: str
    seed: int
    backend: str
    schedule: str = ONE_SHOT

    @property
    def trained_by(self) -> str:
        """The mode, and the schedule where masks change."""
        return self.mode if self.schedule == ONE_SHOT else f"{self.mode}-{self.schedule}"

    @property
    def trained(self) -> Cell:
        """The cell whose training serves this one: without zeros, every method and LoRA mode is the dense baseline."""
        mode = MODES[self.mode]
        if self.sparsity > 0 and mode.is_pruned:
            return self
        return Cell(
            self.model, self.task, "none", 0.0, DENSE if mode.has_adapter else self.mode, self.seed, self.backend
        )


UNTOUCHED_ON_CEREBRAS = ("masked_lora_impl", "packing")
"""The settings of a `Protocol` that the Cerebras backend ignores."""
GRAPH_SETTINGS = ("lora_rank", "global_batch_size")
"""Those on which the sizes in a compiled graph depend."""


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: the axes of its matrix, the protocol of its cells, and where it runs."""

    models: tuple[str, ...] = option(
        "models to prune and train: toy models, checkpoint folders, or Hugging Face ids as ORG/NAME@REVISION",
        metavar="MODEL",
        unset="those of the preset",
    )
    preset: str | None = option(
        "named settings to begin with, listed below: they replace the defaults that this help shows, and the values "
        "that you give replace them",
        None,
        metavar="PRESET",
        unset=f"so {DEFAULT_PRESET} if no model is given or only toy models are, or else no preset",
    )
    tasks: tuple[str, ...] = option(
        "tasks to train and score on, listed below. A mixture such as gsm8k+mawps+svamp trains on the examples of all "
        "its tasks, shuffled, and is scored on each: its accuracy is their mean",
        ("boolq", "hellaswag", "gsm8k"),
        metavar="TASK",
    )
    methods: tuple[str, ...] = option(
        "pruning methods, listed below", ("unstructured", "structured", "random"), metavar="METHOD"
    )
    sparsities: tuple[float, ...] = option(
        "fractions of weights to set to zero, from 0 (the unpruned model) to below 1, in all linear layers but the "
        "embeddings and the output layer",
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        metavar="FRACTION",
    )
    modes: tuple[str, ...] = option("training modes, listed below", SPARSE_ADAPTER_MODES, metavar="MODE")
    schedules: tuple[str, ...] = option("when masks change, listed below", (ONE_SHOT,), metavar="SCHEDULE")
    seeds: tuple[int, ...] = option(
        "random seeds: each has cells of its own, with another order of examples, other initial adapters and other "
        "masks of method random",
        (0,),
        metavar="SEED",
    )
    backend: tuple[str, ...] = option(
        "where models are trained; `torch cerebras` is the same as both",
        ("torch",),
        metavar="BACKEND",
        choices={
            "torch": "on CPU or GPU",
            "cerebras": "with the Cerebras software",
            BOTH: "given alone, every cell on each of the two",
            SPLIT: "given alone, each pair of model and task on one of the two",
        },
    )
    protocol: Protocol = field(default_factory=Protocol)
    budgets: BudgetOptions = field(default_factory=BudgetOptions)
    cerebras: Cerebras = field(default_factory=Cerebras)
    schedule_settings: ScheduleSettings = field(default_factory=ScheduleSettings)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    axes: Axes = field(default_factory=dict)
    """Settings with several values: every cell that reads them is trained with each."""
    find: tuple[str, ...] = option(
        "run only what it takes to find, for each curve over sparsity, the highest level that keeps what its task is "
        "judged by: `within=0.10` lets it lose a tenth of the dense model's; of a text, `perplexity=1.10` lets the "
        "perplexity rise to 1.10 times the dense one. Without --find everything is run",
        (),
        metavar="RULE",
        unset="so every cell is run",
    )
    find_levels: int = option(
        "with --find: a curve is done when a level that passes and one that fails are so many levels apart; 1 is the "
        "exact level, 3 takes fewer runs",
        1,
        metavar="N",
    )
    budget: str | None = option(
        "start no run that would exceed it: `40runs`, `8gpu-hours`, `8cpu-hours` or `8cs3-hours` that trials hold. "
        "Finished runs of the same cells count, whoever ran them, so that the same command resumes",
        None,
        metavar="BUDGET",
        unset="so as many as it takes",
    )
    compare_at: tuple[float, ...] = option(
        "with --find or --budget: sparsities that are run for every curve, whatever comes out. Methods and modes are "
        "compared at these only, since cells that were chosen for their results would favour one side",
        (),
        metavar="FRACTION",
        unset="so methods and modes are not compared",
    )
    data_dir: Path | None = option(
        "source of the examples: a folder with files as listed below; or `hub` for the Hugging Face Hub, from which "
        "they are downloaded when first used; or `synthetic` for generated ones",
        None,
        metavar="DATA",
        unset="so it must be given where no preset sets it, and for every model that is no toy model",
    )
    results_dir: Path = option("results folder", Path("results"), metavar="RESULTS")
    workers: int | None = option(
        "number of trials at the same time",
        None,
        metavar="N",
        unset="as many as the CPU cores and GPUs can hold",
    )
    gpus_per_trial: float | None = option(
        "GPUs that a trial holds: 1, a fraction to share a GPU, 0 for the CPU, or `none` to share each GPU among as "
        "many trials as fit into its memory",
        0.0,
        metavar="GPUS",
    )
    deterministic: bool = option(
        "compute with deterministic algorithms alone, slower: on a GPU a run then repeats to the last bit on the same "
        "kind of card, and one that needs an algorithm without that property fails. On a CPU runs repeat without it",
        False,
    )
    max_retries: int = option(
        "how often a run is repeated after its process or node died or it made no progress", 2, metavar="N"
    )
    hang_seconds: float | None = option(
        "end and repeat a run that makes no progress for this long; `none` waits forever", 1800.0, metavar="SECONDS"
    )
    tracking_uri: str | None = option(
        "address of the MLflow store",
        None,
        metavar="URI",
        unset="so the variable MLFLOW_TRACKING_URI, or else RESULTS/mlflow.db",
    )

    def __post_init__(self) -> None:
        for axis in ("models", "tasks", "methods", "sparsities", "modes", "schedules", "seeds", "backend"):
            values = getattr(self, axis)
            rule(len(values) > 0, f"{axis} must name at least one", values, "Name one.")
            rule(len(set(values)) == len(values), f"{axis} must not repeat a value", values, "Remove the repeats.")
        check_sparsities(self.sparsities)
        for mode in self.modes:
            if mode not in MODES:
                raise unknown_name("mode", mode, MODES)
        rule(
            all(MODES[mode].is_pruned for mode in self.modes) or not any(self.sparsities),
            "the mode dense prunes nothing, so all sparsities must be 0 with it",
            self.sparsities,
            "Leave it out: at sparsity 0 the sparse modes are the dense baseline.",
        )
        for mode, name in product(self._modes_without_adapter, LORA_SETTINGS):
            value, default = getattr(self.protocol, name), getattr(Protocol, name)
            rule(
                value == default,
                f"the mode {mode} trains the weights themselves, so {name} must not be set with it",
                value,
                f"Leave it at {default}, or sweep the LoRA modes apart.",
            )
        check_schedules(self.schedules, self.schedule_settings, self.modes, self.sparsities, self.protocol)
        alone = len(self.backend) == 1 or not {BOTH, SPLIT} & set(self.backend)
        rule(alone, f"{BOTH} and {SPLIT} name every backend, so nothing goes with them", self.backend, "Give one.")
        for backend in self.backend if self.backend != (SPLIT,) else ():
            if backend not in BACKENDS:
                raise unknown_name("backend", backend, (*BACKENDS, BOTH, SPLIT))
        if "cerebras" in self.backends:
            self._check_cerebras()
        if self.early_stopping.stop_early:
            self._check_early_stopping()
        rule(self.workers is None or self.workers >= 1, "workers must be at least 1", self.workers, "Give 1 or more.")
        gpus = self.gpus_per_trial
        rule(gpus is None or 0 <= gpus <= 1, "gpus_per_trial must be in [0, 1] or none", gpus, "Give 1, or a fraction.")
        tokens = self.budgets.generation_tokens
        rule(
            tokens is None or tokens > self.protocol.max_new_tokens,
            f"generation_tokens must hold a prompt and an answer of max_new_tokens = {self.protocol.max_new_tokens}",
            tokens,
            "Raise it.",
        )
        limit = self.hang_seconds
        rule(limit is None or limit > 0, "hang_seconds must be above 0 or none", limit, "Give seconds.")
        rule(self.max_retries >= 0, "max_retries must be at least 0", self.max_retries, "Give 0 or more.")
        check_address("tracking_uri", self.tracking_uri or "")
        check_spending(self.find, self.find_levels, self.budget, self.compare_at, self.sparsities)
        check_axes(self.axes)
        for point in self.points if self.axes else ():
            self._check_point(point)

    @property
    def points(self) -> tuple[Point, ...]:
        """Every combination of the values of its axes; one without any where there are none."""
        return points_of(self.axes)

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The protocol of each point."""
        return tuple(self.protocol_at(point) for point in self.points)

    def protocol_at(self, point: Point) -> Protocol:
        return replace(self.protocol, **own_settings(Protocol, point))

    def schedule_settings_at(self, point: Point) -> ScheduleSettings:
        return replace(self.schedule_settings, **own_settings(ScheduleSettings, point))

    def _check_point(self, point: Point) -> None:
        """Raise `InputError` where the sweep of this point alone would."""
        reads_adapters = any(name in LORA_SETTINGS for name, _ in point)
        modes = tuple(mode for mode in self.modes if MODES[mode].has_adapter or not reads_adapters)
        try:
            protocol, schedule = self.protocol_at(point), self.schedule_settings_at(point)
            replace(self, axes={}, protocol=protocol, schedule_settings=schedule, modes=modes or self.modes)
        except InputError as error:
            raise explained(error, point, self.protocol) from error

    @property
    def find_rule(self) -> FindRule | None:
        return FindRule.parse(self.find)

    @property
    def budget_limit(self) -> BudgetLimit | None:
        return None if self.budget is None else BudgetLimit.parse(self.budget)

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend that a cell may be of."""
        return BACKENDS if self.backend == (SPLIT,) else self.backend

    @property
    def _modes_without_adapter(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if not MODES[mode].has_adapter)

    def _check_cerebras(self) -> None:
        check_on_cerebras(self.schedules, self.schedule_settings)
        masked = [mode for mode in self.modes if MODES[mode].masks_update]
        rule(
            not (self.protocol.lora_dropout and masked and any(self.sparsities)),
            f"the backend cerebras has no dropout before a masked update, so lora_dropout must be 0 with {masked}",
            self.protocol.lora_dropout,
            "Leave it alone, or sweep the other modes apart.",
        )
        rule(
            not self.protocol.train_also,
            "the backend cerebras trains the pruned layers or their adapters alone, so train_also must be empty with "
            "it",
            self.protocol.train_also,
            "Leave it out, or sweep the backend torch apart.",
        )
        for name in UNTOUCHED_ON_CEREBRAS:
            value, default = getattr(self.protocol, name), getattr(Protocol, name)
            rule(
                value == default,
                f"the backend cerebras needs {name} = {default}",
                value,
                "Leave it alone.",
            )
        for name in (name for axis in self.axes for name in settings_of(axis) if name in GRAPH_SETTINGS):
            rule(False, f"graphs for a CS-3 are planned for one {name}", self.axes, "Sweep its values apart.")
        rule(
            self.cerebras.cerebras_target not in UNTRAINED_TARGETS or self.backends == ("cerebras",),
            f"cerebras_target {self.cerebras.cerebras_target} trains nothing, so the only backend must be cerebras",
            self.backend,
            "Give cerebras alone.",
        )

    def _check_early_stopping(self) -> None:
        rule(
            "cerebras" not in self.backends,
            "stop_early judges trainings at rungs, and those of the backend cerebras are measured only at their end",
            self.backend,
            "Leave stop_early out, or sweep the backend torch alone.",
        )
        rule(
            ITERATIVE not in self.schedules,
            f"a level of the schedule {ITERATIVE} needs the end of the one before it, which stop_early may never reach",
            self.schedules,
            "Leave stop_early out, or sweep the other schedules apart.",
        )
        if not self.axes:  # or else each of its points says how many steps
            self.early_stopping.rung_steps(self.protocol.steps)

    @classmethod
    def from_names(cls, names: Mapping[str, Any]) -> SweepConfig:
        """A checked configuration from flat {name: value}, values as Python, YAML or text has them.

        What the preset sets, named as `preset` or found by `preset_settings`, gives way to `names`.
        """
        kinds = (cls, Protocol, BudgetOptions, Cerebras, ScheduleSettings, EarlyStopping)
        known = {f.name for kind in kinds for f in fields(kind)} - {
            "protocol",
            "budgets",
            "cerebras",
            "schedule_settings",
            "early_stopping",
        }
        for name in names:
            if name not in known:
                raise unknown_name("setting", name, known)
        axes = typed_axes(names.get("axes", {}))
        for name in (name for axis in axes for name in settings_of(axis)):
            rule(name not in names, f"{name} is an axis, so it has no other value", names.get(name), "Leave one out.")
        given, names = names, preset_settings(names) | dict(without_published(names))
        own, protocol, budgets, cerebras, schedule_settings, early_stopping = (
            {f.name: converted(kind, f, names[f.name]) for f in fields(kind) if f.name in names and f.name != "axes"}
            for kind in kinds
        )
        if own.get("backend") == (BOTH,):
            own["backend"] = BACKENDS
        config = cls(
            **own,
            axes=axes,
            protocol=Protocol(**protocol),
            budgets=BudgetOptions(**budgets),
            cerebras=Cerebras(**cerebras),
            schedule_settings=ScheduleSettings(**schedule_settings),
            early_stopping=EarlyStopping(**early_stopping),
        )
        check_are_read(schedule_settings.keys() & given.keys(), config.schedules, config.modes)
        return config
