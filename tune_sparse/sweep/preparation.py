"""Everything that is checked and made, once, before the first trial of a sweep."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tune_sparse.cerebras.environment import check_cluster
from tune_sparse.cerebras.preflight import working_bytes
from tune_sparse.config import SweepConfig
from tune_sparse.errors import InputError, TooLargeError
from tune_sparse.files import check_room
from tune_sparse.ledger.lease import check_not_locked
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import prepare_models
from tune_sparse.models.from_scratch import is_from_scratch
from tune_sparse.models.toy_models import TOY_MODELS
from tune_sparse.sweep.cards import check_devices, local_devices
from tune_sparse.sweep.examples import read_examples
from tune_sparse.sweep.forecast import trials_at_once
from tune_sparse.sweep.plan import Plan, check_names, checkpoint_bytes, host_bytes, plan_cells, pruning_bytes
from tune_sparse.tracking.sync import tracking_uri

logger = logging.getLogger(__name__)
FREE_SOME = "Free some, or give another --results-dir."


def prepare(config: SweepConfig, report: Callable[[str], None] = logger.info) -> Plan:
    """Make a sweep ready to run: check names, examples and the results folder, train the toy models that are not there
    yet, check every model, and plan. The plan serves forecast, pilots and sweep; nothing is read again for them.

    Raises `InputError` for anything that would stop a trial later.
    """
    check_names(config)
    tracking_uri(config)  # raises for an address that holds a password
    examples = read_examples(config)
    check_folder(config.results_dir)
    made = [model for model in config.models if model in TOY_MODELS or is_from_scratch(model)]
    prepare_models(made, report=report)
    return plan_cells(config, examples)


def check_folder(folder: Path) -> None:
    """Raise `InputError` unless the results folder can be written and is free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"the results folder must be writable, {folder} is not: {error}. Give another --results-dir."
        ) from error
    check_not_locked(folder)


def check_host(needed: int) -> None:
    """Raise `TooLargeError` if a single trial takes more memory than this machine has."""
    total = psutil.virtual_memory().total
    if needed > total:
        raise TooLargeError(
            f"the memory of a machine must hold a trial, which takes up to {needed / 1e9:.1f} GB, it has "
            f"{total / 1e9:.1f}. Give --gpus-per-trial 1 on a machine with a GPU, or take a smaller model, precision "
            "bfloat16, or a machine with more memory."
        )


def needed_bytes(plan: Plan, ledger: Ledger, missing: Sequence[Run]) -> int:
    """Room that a sweep needs in its results folder: what its runs leave there, their prunings, and the checkpoints of
    as many trainings as run at once, or of one where only a cluster knows how many do; of all that may be stopped
    early."""
    written = sum(plan.estimate_bytes(run) for run in missing)
    may_stop = plan.config.early_stopping.stop_early is not None
    at_once = len(missing) if may_stop else min(trials_at_once(plan.config, "torch") or 1, len(missing))
    return written + pruning_bytes(plan, ledger, missing) + at_once * checkpoint_bytes(plan, missing)


def check_start(plan: Plan, ledger: Ledger, missing: Sequence[Run]) -> None:
    """Raise `InputError` unless a GPU of this machine can hold the missing runs, and there is room for what they will
    write, and a cluster for those on Cerebras. What the GPUs of a Ray cluster can hold, only the cluster knows."""
    if "RAY_ADDRESS" not in os.environ:
        check_devices(plan.config, missing, plan.dims, local_devices())
        check_host(host_bytes(plan, missing))
    check_room(ledger.folder, needed_bytes(plan, ledger, missing), "a sweep", FREE_SOME)
    if "cerebras" in plan.config.backends:
        settings = plan.config.cerebras
        if settings.cerebras_target == "csx":
            check_cluster(settings)
        needed = working_bytes(plan.config, [checkpoint.dims for checkpoint in plan.checkpoints.values()])
        check_room(ledger.folder, needed, "training on Cerebras", FREE_SOME)
