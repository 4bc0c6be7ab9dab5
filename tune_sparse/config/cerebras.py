"""Where and how the backend cerebras trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune_sparse.config.axes import settings_of
from tune_sparse.config.options import option, rule
from tune_sparse.config.protocol import Protocol
from tune_sparse.config.schedule_settings import check_on_cerebras
from tune_sparse.errors import unknown_name
from tune_sparse.modes import MODES

if TYPE_CHECKING:
    from tune_sparse.config import SweepConfig

UNTOUCHED_ON_CEREBRAS = ("masked_lora_impl", "packing")
"""The settings of a `Protocol` that the Cerebras backend ignores."""
GRAPH_SETTINGS = ("lora_rank", "global_batch_size")
"""Those on which the sizes in a compiled graph depend."""

CEREBRAS_TARGETS = {
    "csx": "train on CS-3 systems",
    "cpu": "train on the CPU of this machine",
    "validate": "only check that the Cerebras compiler accepts the models that would be trained, and train nothing",
    "compile": "only compile the models that would be trained, into the appliance's cache, which takes no CS-3, and "
    "train nothing",
}
UNTRAINED_TARGETS = ("validate", "compile")
HALF_PRECISIONS = {
    "bfloat16": "8 bits of exponent, 7 of fraction",
    "cbfloat16": "6 bits of exponent, 9 of fraction, with a loss that is scaled as needed",
}
JOB_PRIORITIES = {"p1": "before others", "p2": "as most", "p3": "after others"}
CSX_MICRO_BATCHES = {
    "auto": "the compiler tries several, which takes most of the time of compiling a large model",
    "explore": "it tries more of them",
    "none": "a whole batch at once",
}
EXACT, ROUNDED, LEFT_OUT = "exact", "rounded", "none"
ROUNDED_WITHIN = 0.1
"""A rounded annotation may be so far from the sparsity of a matrix."""
SPARSITY_ANNOTATIONS = {
    EXACT: "the sparsity of each matrix to the last digit: nearly every cell is compiled anew",
    ROUNDED: f"the sparsity of the cell for all of its matrices, each of which must be within {ROUNDED_WITHIN} of it: "
    "cells of one sparsity share a compiled model",
    LEFT_OUT: "nothing: cells of all sparsities share a compiled model, which computes with the zeros",
}


@dataclass(frozen=True)
class Cerebras:
    """Where and how the backend cerebras trains. Of these, only the target and half_precision change numbers."""

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
    compile_first: bool = option(
        "true or false: before the first training, compile all models that will be trained, into the appliance's "
        "cache, which takes hours and no CS-3",
        False,
        metavar="BOOL",
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
    half_precision: str = option(
        "numbers with which a CS-3 computes",
        "bfloat16",
        metavar="PRECISION",
        choices=HALF_PRECISIONS,
    )
    sparsity_annotation: str = option(
        "the sparsity that the compiler of a CS-3 is told, by which it skips zeros",
        ROUNDED,
        metavar="ANNOTATION",
        choices=SPARSITY_ANNOTATIONS,
    )
    bucket_tokens: tuple[int, ...] = option(
        "lengths in tokens to which examples are padded for a CS-3, those of a task to the shortest that holds its "
        "longest: tasks of one length share a compiled model",
        (),
        metavar="N",
        unset="lengths for which compiling and padding together take the fewest hours",
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
        if self.half_precision not in HALF_PRECISIONS:
            raise unknown_name("half_precision", self.half_precision, HALF_PRECISIONS)
        if self.sparsity_annotation not in SPARSITY_ANNOTATIONS:
            raise unknown_name("sparsity_annotation", self.sparsity_annotation, SPARSITY_ANNOTATIONS)
        rule(
            not (self._is_compiled_ahead and self.sparsity_annotation == EXACT),
            "sparsity_annotation must be rounded or none to compile before a training: the exact sparsity of a matrix "
            "is known only when it is pruned",
            EXACT,
            "Give --sparsity-annotation rounded.",
        )
        lengths = self.bucket_tokens
        rule(all(n >= 1 for n in lengths), "bucket_tokens must be at least 1", lengths, "Give larger numbers.")
        share = self.cerebras_share
        rule(0 < share < 1, "cerebras_share must be in (0, 1)", share, "Give a fraction, or another backend.")

    @property
    def _is_compiled_ahead(self) -> bool:
        return self.compile_first or self.cerebras_target == "compile"


def check_cerebras(config: SweepConfig) -> None:
    """Raise `InputError` for what the backend cerebras cannot train, of a sweep that has it."""
    check_on_cerebras(config.schedules, config.schedule_settings)
    masked = [mode for mode in config.modes if MODES[mode].masks_update]
    rule(
        not (config.protocol.lora_dropout and masked and any(config.sparsities)),
        f"the backend cerebras has no dropout before a masked update, so lora_dropout must be 0 with {masked}",
        config.protocol.lora_dropout,
        "Leave it alone, or sweep the other modes apart.",
    )
    rule(
        not config.protocol.train_also,
        "the backend cerebras trains the pruned layers or their adapters alone, so train_also must be empty with it",
        config.protocol.train_also,
        "Leave it out, or sweep the backend torch apart.",
    )
    for name in UNTOUCHED_ON_CEREBRAS:
        value, default = getattr(config.protocol, name), getattr(Protocol, name)
        rule(
            value == default,
            f"the backend cerebras needs {name} = {default}",
            value,
            "Leave it alone.",
        )
    for name in (name for axis in config.axes for name in settings_of(axis) if name in GRAPH_SETTINGS):
        rule(False, f"graphs for a CS-3 are planned for one {name}", config.axes, "Sweep its values apart.")
    rule(
        config.cerebras.cerebras_target not in UNTRAINED_TARGETS or config.backends == ("cerebras",),
        f"cerebras_target {config.cerebras.cerebras_target} trains nothing, so the only backend must be cerebras",
        config.backend,
        "Give cerebras alone.",
    )
