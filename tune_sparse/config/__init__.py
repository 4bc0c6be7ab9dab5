"""Every default of the system, once, with the rules that values must obey.

The same names serve the command line (`--models`, `--set steps=20`), a YAML file and Python:
`SweepConfig.from_names({"models": ["tiny-llama"], "steps": 20})`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from tune_sparse.config.budgets import BudgetOptions as BudgetOptions
from tune_sparse.config.options import converted, option, rule
from tune_sparse.config.protocol import Protocol as Protocol
from tune_sparse.errors import unknown_name
from tune_sparse.modes import DENSE, MODES, SPARSE_ADAPTER_MODES
from tune_sparse.net import check_address

LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "masked_lora_impl")
BACKENDS = ("torch", "cerebras")
BOTH, SPLIT = "both", "split"
"""As `backend`: each cell on each, or whole (model, task) blocks on one or the other."""
CS3 = "CS3"
"""A Ray resource, held while a training runs: one for each CS-3 training at a time."""
CS3_TRIAL = "CS3_TRIAL"
"""A Ray resource that a trial of the backend cerebras holds from its start to its end, also while it prunes and scores.
One more than there are CS3 keeps these busy, and other trials are never crowded out."""
CEREBRAS_TARGETS = {
    "csx": "train on CS-3 systems",
    "cpu": "train on the CPU of this machine",
    "validate": "only check that the Cerebras compiler accepts each model in each mode at the highest sparsity, and "
    "train nothing",
}
JOB_PRIORITIES = {"p1": "before others", "p2": "as most", "p3": "after others"}
CSX_MICRO_BATCHES = {
    "auto": "the compiler tries several, which takes most of the time of compiling a large model",
    "explore": "it tries more of them",
    "none": "a whole batch at once",
}
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

    @property
    def trained(self) -> Cell:
        """The cell whose training serves this one: without zeros, every method and LoRA mode is the dense baseline."""
        mode = MODES[self.mode]
        if self.sparsity > 0 and mode.is_pruned:
            return self
        return Cell(
            self.model, self.task, "none", 0.0, DENSE if mode.has_adapter else self.mode, self.seed, self.backend
        )


@dataclass(frozen=True)
class Cerebras:
    """Where and how the backend cerebras trains. Of these, only the target changes numbers."""

    cerebras_target: str = option(
        "how to use the Cerebras software",
        "csx",
        metavar="TARGET",
        choices=CEREBRAS_TARGETS,
    )
    cs3: int = option(
        "number of trainings on CS-3 systems at the same time; without effect on a running Ray cluster, where the "
        "amount of its resource named CS3 decides",
        1,
        metavar="N",
    )
    num_csx: int = option("number of CS-3 systems that one training uses", 1, metavar="N")
    mount_dirs: tuple[str, ...] = option(
        "folders to mount on the nodes of the Cerebras cluster", (), metavar="FOLDER", unset="none"
    )
    python_paths: tuple[str, ...] = option(
        "folders with Python packages for the nodes of the Cerebras cluster", (), metavar="FOLDER", unset="none"
    )
    num_workers_per_csx: int = option(
        "input workers of the Cerebras cluster for each CS-3 system of a training", 1, metavar="N"
    )
    automount: bool = option(
        "true or false: let the client mount every folder that the Cerebras cluster can mount, besides --mount-dirs",
        True,
        metavar="BOOL",
    )
    job_priority: str = option(
        "priority of the jobs in the appliance's queue", "p2", metavar="PRIORITY", choices=JOB_PRIORITIES
    )
    compile_dir: str | None = option(
        "folder of the appliance in which compiled models are kept and found again",
        None,
        metavar="FOLDER",
        unset="that of the client",
    )
    csx_micro_batch_size: str = option(
        "examples that a CS-3 works on at once: a number, or how the compiler finds one",
        "auto",
        metavar="N",
        choices=CSX_MICRO_BATCHES,
    )
    disable_version_check: bool = option(
        "true or false: train although the client does not expect its release and that of the cluster to go together",
        False,
        metavar="BOOL",
    )
    train_timeout_seconds: float | None = option(
        "stop a training on Cerebras that takes longer, queue and compiling left out, and record its run as failed",
        None,
        metavar="SECONDS",
        unset="no limit",
    )
    checkpoint_steps: int | None = option(
        "steps between two checkpoints of a training on Cerebras, from which one that was lost goes on; each is as "
        "large as the model in float32, and takes minutes to save",
        None,
        metavar="N",
        unset="only at the end",
    )
    scoring_gpus: float = option(
        "GPUs that a trial holds to prune and score a model that Cerebras trains: from 0 to 1", 0.0, metavar="GPUS"
    )
    cerebras_share: float = option(
        "fraction of the pairs of model and task that --backend split trains on Cerebras", 0.5, metavar="FRACTION"
    )

    def __post_init__(self) -> None:
        if self.cerebras_target not in CEREBRAS_TARGETS:
            raise unknown_name("cerebras_target", self.cerebras_target, CEREBRAS_TARGETS)
        for name in ("cs3", "num_csx", "num_workers_per_csx"):
            rule(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name), "Give a larger number.")
        limit = self.train_timeout_seconds
        rule(limit is None or limit > 0, "train_timeout_seconds must be above 0 or none", limit, "Give seconds.")
        steps = self.checkpoint_steps
        rule(steps is None or steps >= 1, "checkpoint_steps must be at least 1 or none", steps, "Give steps.")
        rule(0 <= self.scoring_gpus <= 1, "scoring_gpus must be in [0, 1]", self.scoring_gpus, "Give 1, or a fraction.")
        if self.job_priority not in JOB_PRIORITIES:
            raise unknown_name("job_priority", self.job_priority, JOB_PRIORITIES)
        micro = self.csx_micro_batch_size
        rule(
            micro in CSX_MICRO_BATCHES or (micro.isdecimal() and int(micro) >= 1),
            f"csx_micro_batch_size must be {', '.join(CSX_MICRO_BATCHES)} or a number of at least 1",
            micro,
            "Give one of these.",
        )
        share = self.cerebras_share
        rule(0 < share < 1, "cerebras_share must be in (0, 1)", share, "Give a fraction, or another --backend.")


UNTOUCHED_ON_CEREBRAS = ("lora_dropout", "masked_lora_impl", "packing")
"""The settings of a `Protocol` that the Cerebras backend ignores."""


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: the axes of its matrix, the protocol of its cells, and where it runs."""

    models: tuple[str, ...] = option(
        "models to prune and train: toy models, checkpoint folders, or Hugging Face ids as ORG/NAME@REVISION",
        metavar="MODEL",
        unset="those of the preset",
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
    data_dir: Path | None = option(
        "source of the examples: a folder with files as listed below; or `hub` for the Hugging Face Hub, from which "
        "they are downloaded when first used; or `synthetic` for generated ones",
        None,
        metavar="DATA",
        unset="so it must be given with a preset that does not set it",
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
        for axis in ("models", "tasks", "methods", "sparsities", "modes", "seeds", "backend"):
            values = getattr(self, axis)
            rule(len(values) > 0, f"{axis} must name at least one", values, f"Give --{axis}.")
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
        alone = len(self.backend) == 1 or not {BOTH, SPLIT} & set(self.backend)
        rule(alone, f"{BOTH} and {SPLIT} name every backend, so nothing goes with them", self.backend, "Give one.")
        for backend in self.backend if self.backend != (SPLIT,) else ():
            if backend not in BACKENDS:
                raise unknown_name("backend", backend, (*BACKENDS, BOTH, SPLIT))
        if "cerebras" in self.backends:
            self._check_cerebras()
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

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend that a cell may be of."""
        return BACKENDS if self.backend == (SPLIT,) else self.backend

    @property
    def _modes_without_adapter(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if not MODES[mode].has_adapter)

    def _check_cerebras(self) -> None:
        rule(
            not self._modes_without_adapter,
            "the backend cerebras trains adapters, so the mode "
            f"{' and '.join(self._modes_without_adapter)} must not be in modes",
            self.modes,
            "Leave it out, or sweep it with --backend torch.",
        )
        for name in UNTOUCHED_ON_CEREBRAS:
            value, default = getattr(self.protocol, name), getattr(Protocol, name)
            rule(
                value == default,
                f"the backend cerebras needs {name} = {default}",
                value,
                "Leave it alone.",
            )
        rule(
            self.cerebras.cerebras_target != "validate" or self.backends == ("cerebras",),
            "cerebras_target validate trains nothing, so the only backend must be cerebras",
            self.backend,
            "Give --backend cerebras alone.",
        )

    @classmethod
    def from_names(cls, names: Mapping[str, Any]) -> SweepConfig:
        """A checked configuration from flat {name: value}, values as Python, YAML or text has them."""
        kinds = (cls, Protocol, BudgetOptions, Cerebras)
        known = {f.name for kind in kinds for f in fields(kind)} - {"protocol", "budgets", "cerebras"}
        for name in names:
            if name not in known:
                raise unknown_name("setting", name, known)
        rule(bool(names.get("models")), "a sweep needs models", names.get("models"), "Give --models or a preset.")
        own, protocol, budgets, cerebras = (
            {f.name: converted(kind, f, names[f.name]) for f in fields(kind) if f.name in names} for kind in kinds
        )
        if own.get("backend") == (BOTH,):
            own["backend"] = BACKENDS
        return cls(
            **own,
            protocol=Protocol(**protocol),
            budgets=BudgetOptions(**budgets),
            cerebras=Cerebras(**cerebras),
        )
