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

from tune_sparse.config.options import converted, option, rule
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
CEREBRAS_TARGETS = ("cpu", "validate", "csx")
PRECISIONS = ("float32", "bfloat16")
MASKED_LORA_IMPLS = ("auto", "structured", "effective-weight")
CALIBRATIONS = ("task", "wikitext2")
CALIBRATION_ORDERS = ("dense", "sequential")
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
class Protocol:
    """How a cell is trained and scored. Each field changes numbers, so all are part of a run's identity.

    The defaults are the protocol of the 7B matrix.
    """

    steps: int = option("optimizer steps of a training", 200)
    global_batch_size: int = option("rows per optimizer step, accumulated over micro-batches", 256)
    micro_batch_size: int = option("rows per forward pass; divides the global batch", 8)
    learning_rate: float = option("peak of the cosine schedule", 3e-4)
    final_learning_rate: float = option("end of the cosine schedule", 3e-5)
    warmup_fraction: float = option("linear warm-up as a fraction of the steps", 0.03)
    warmup_steps: int | None = option("linear warm-up in steps; wins over the fraction", None)
    weight_decay: float = option("of AdamW", 0.1)
    beta1: float = option("of AdamW", 0.9)
    beta2: float = option("of AdamW", 0.95)
    max_grad_norm: float = option("gradients are clipped to this norm", 1.0)
    lora_rank: int = option("rank R of the adapters", 16)
    lora_alpha: float = option("scaling s = alpha / R", 32.0)
    lora_dropout: float = option("dropout on the adapters' input", 0.0)
    masked_lora_impl: str = option(f"how masked adapters compute: {', '.join(MASKED_LORA_IMPLS)}", "auto")
    train_on_prompt: bool = option("the prompt's tokens count in the loss too, not the answer's alone", False)
    packing: bool = option("rows share sequences of max_tokens, without attention from row to row", False)
    activation_checkpointing: bool = option("activations are computed again in the backward, to save memory", False)
    precision: str = option(f"of the weights: {' or '.join(PRECISIONS)}", "bfloat16")
    max_tokens: int = option("longer rows, or longer than the model's context, lose the start of their prompt", 2048)
    max_new_tokens: int = option("limit of a generated answer", 256)
    num_fewshot: int = option("worked examples before each test question; tuning is on questions without any", 0)
    batch_tokens: int = option("padded tokens of a scoring pass: bounds its memory", 8192)
    n_train: int | None = option("training rows used; none for all", None)
    n_selection: int | None = option("rows carved from train for the eval loss; none for a tenth of train", 256)
    n_test: int | None = option("test rows scored; none for all", None)
    eval_every: int = option("steps between two eval losses", 50)
    threads: int = option("CPU threads of a trial; their number changes the last bits of a sum", 1)
    calibration: str = option("rows that calibrated scores are measured on: the cell's own task, or wikitext2", "task")
    calibration_examples: int = option("their number", 128)
    calibration_tokens: int = option("of a row of text; a task's rows are as long as in training", 2048)
    calibration_order: str = option(
        "dense: inputs of the dense model; sequential: of the blocks pruned before", "dense"
    )

    def __post_init__(self) -> None:
        counted = (
            "steps",
            "global_batch_size",
            "micro_batch_size",
            "lora_rank",
            "max_new_tokens",
            "eval_every",
            "threads",
        )
        for name in (*counted, "calibration_examples"):
            rule(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name), "Give a larger number.")
        for name in ("max_tokens", "batch_tokens", "calibration_tokens"):
            rule(getattr(self, name) >= 2, f"{name} must be at least 2", getattr(self, name), "Give a larger number.")
        rule(
            self.max_new_tokens < self.max_tokens,
            f"max_new_tokens must leave room for a prompt in max_tokens = {self.max_tokens}",
            self.max_new_tokens,
            "Lower it.",
        )
        rule(self.num_fewshot >= 0, "num_fewshot must be at least 0", self.num_fewshot, "Give 0 or more.")
        for name in ("n_train", "n_selection", "n_test"):
            value = getattr(self, name)
            rule(value is None or value >= 1, f"{name} must be at least 1 or none", value, "Give more examples.")
        for name in ("learning_rate", "lora_alpha", "max_grad_norm"):
            rule(getattr(self, name) > 0, f"{name} must be above 0", getattr(self, name), "Give a positive number.")
        rule(
            self.global_batch_size % self.micro_batch_size == 0,
            "micro_batch_size must divide global_batch_size",
            f"{self.micro_batch_size} and {self.global_batch_size}",
            "Give a divisor.",
        )
        rule(
            0 <= self.final_learning_rate <= self.learning_rate,
            "final_learning_rate must be between 0 and learning_rate",
            self.final_learning_rate,
            "Lower it.",
        )
        rule(self.weight_decay >= 0, "weight_decay must be at least 0", self.weight_decay, "Give 0 or more.")
        for name in ("beta1", "beta2", "lora_dropout", "warmup_fraction"):
            rule(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", getattr(self, name), "Give a fraction.")
        rule(
            0 <= self.warmup < self.steps,
            f"the warm-up must be shorter than the training of {self.steps} steps",
            self.warmup,
            "Lower warmup_steps or raise steps.",
        )
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.masked_lora_impl not in MASKED_LORA_IMPLS:
            raise unknown_name("masked_lora_impl", self.masked_lora_impl, MASKED_LORA_IMPLS)
        if self.calibration not in CALIBRATIONS:
            raise unknown_name("calibration", self.calibration, CALIBRATIONS)
        if self.calibration_order not in CALIBRATION_ORDERS:
            raise unknown_name("calibration_order", self.calibration_order, CALIBRATION_ORDERS)

    @property
    def calibrated_by(self) -> dict[str, Any]:
        """The settings that decide calibrated scores besides the examples: part of the identity of calibrated runs."""
        return {name: getattr(self, name) for name in CALIBRATION_SETTINGS}

    def within(self, max_positions: int) -> Protocol:
        """For a model whose context may be shorter than `max_tokens`. Raises `InputError` if no prompt would fit."""
        return replace(self, max_tokens=min(self.max_tokens, max_positions))

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return round(self.warmup_fraction * self.steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def pack_to(self) -> int | None:
        """Tokens of a packed sequence; None without packing."""
        return self.max_tokens if self.packing else None


FLOPS_TOKENS = 2048
"""The sequence length at which inference FLOPs are compared."""
SCORING = ("precision", "max_tokens", "max_new_tokens", "num_fewshot", "batch_tokens", "n_test", "threads")
"""The settings of a `Protocol` that scoring reads."""
CALIBRATION_SETTINGS = tuple(f.name for f in fields(Protocol) if f.name.startswith("calibration"))


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

    cerebras_target: str = option("cpu to train there, validate to lower only, csx for CS-3 systems", "csx")
    cs3: int = option("CS-3 trainings at once, where the sweep starts Ray itself", 1)
    num_csx: int = option("CS-3 systems of one training", 1)
    mount_dirs: tuple[str, ...] = option("folders that the appliance's nodes must see", ())
    python_paths: tuple[str, ...] = option("where they find Python packages", ())
    train_timeout_seconds: float | None = option("a training that takes longer is ended; none for no limit", None)
    scoring_gpus: float = option("GPU, or a fraction of it, that a trial holds to prune and score", 0.0)
    cerebras_share: float = option("of the (model, task) blocks, what `--backend split` trains on Cerebras", 0.5)

    def __post_init__(self) -> None:
        if self.cerebras_target not in CEREBRAS_TARGETS:
            raise unknown_name("cerebras_target", self.cerebras_target, CEREBRAS_TARGETS)
        for name in ("cs3", "num_csx"):
            rule(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name), "Give a larger number.")
        limit = self.train_timeout_seconds
        rule(limit is None or limit > 0, "train_timeout_seconds must be above 0 or none", limit, "Give seconds.")
        rule(0 <= self.scoring_gpus <= 1, "scoring_gpus must be in [0, 1]", self.scoring_gpus, "Give 1, or a fraction.")
        share = self.cerebras_share
        rule(0 < share < 1, "cerebras_share must be in (0, 1)", share, "Give a fraction, or another --backend.")


UNTOUCHED_ON_CEREBRAS = ("lora_dropout", "masked_lora_impl", "packing", "activation_checkpointing")
"""The settings of a `Protocol` that the Cerebras backend ignores."""


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: the axes of its matrix, the protocol of its cells, and where it runs."""

    models: tuple[str, ...] = option("names of toy models, checkpoint folders, or hub ids with @revision")
    tasks: tuple[str, ...] = option("benchmarks", ("boolq", "hellaswag", "gsm8k"))
    methods: tuple[str, ...] = option("pruning methods", ("unstructured", "structured", "random"))
    sparsities: tuple[float, ...] = option(
        "fractions of zeros in the pruned matrices", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    )
    modes: tuple[str, ...] = option("training modes", SPARSE_ADAPTER_MODES)
    seeds: tuple[int, ...] = option("of the rows' order, the adapters and the random masks", (0,))
    backend: tuple[str, ...] = option(
        "where trials compute: torch, cerebras, both (each cell on each) or split (whole model-task blocks)", ("torch",)
    )
    protocol: Protocol = field(default_factory=Protocol)
    cerebras: Cerebras = field(default_factory=Cerebras)
    data_dir: Path | None = option("folder of tasks, `hub` to fetch them, `synthetic` for generated rows", None)
    results_dir: Path = option("the ledger, MLflow and reports", Path("results"))
    workers: int | None = option("trials at once; none for one per core (or per GPU)", None)
    gpus_per_trial: float | None = option("GPU, or a fraction of it, that a trial holds; none to pack by memory", 0.0)
    max_retries: int = option("new tries of a trial after an infrastructure error", 2)
    hang_seconds: float | None = option("a trial without progress for so long is tried again; none to wait", 1800.0)
    tracking_uri: str | None = option("of MLflow; none for MLFLOW_TRACKING_URI, or SQLite in the results folder", None)

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
        rule(
            self.protocol.masked_lora_impl != "structured" or self.methods == ("structured",),
            "masked_lora_impl structured needs masks of whole rows and columns, so the only method must be structured",
            self.methods,
            "Set masked_lora_impl=auto.",
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
        known = {f.name for kind in (cls, Protocol, Cerebras) for f in fields(kind)} - {"protocol", "cerebras"}
        for name in names:
            if name not in known:
                raise unknown_name("setting", name, known)
        rule(bool(names.get("models")), "a sweep needs models", names.get("models"), "Give --models or a preset.")
        own, protocol, cerebras = (
            {f.name: converted(kind, f, names[f.name]) for f in fields(kind) if f.name in names}
            for kind in (cls, Protocol, Cerebras)
        )
        if own.get("backend") == (BOTH,):
            own["backend"] = BACKENDS
        return cls(**own, protocol=Protocol(**protocol), cerebras=Cerebras(**cerebras))
