"""Whole cells on a device that is not the CPU: they run, compute what the CPU computes, and the host rarely waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from simulated_device import DEVICE, Activity, simulated_device
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.config import BudgetOptions, ScheduleSettings
from tune_sparse.config.budgets import ALWAYS, NEVER
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.modes import MODES

pytestmark = pytest.mark.xdist_group("simulated device")
STEPS, TOKENS, NEW_TOKENS, CALIBRATION = 3, 128, 32, 6
FOR_A_MATRIX, FOR_AN_UPDATE = 30, 20
CELLS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense", "method": "none", "sparsity": 0.0, "task": "hellaswag"},
    "unstructured": {"method": "unstructured", "precision": "bfloat16"},
    "structured": {"method": "structured", "task": "hellaswag"},
    "wanda": {"mode": "masked-finetuning", "method": "wanda", "precision": "bfloat16", "schedule": "rigl"},
    "owl": {"mode": "sparse-to-dense", "method": "wanda-owl", "task": "hellaswag", "checkpoints": True},
    "sparsegpt": {"mode": "sparse-to-dense", "method": "sparsegpt", "task": "gsm8k", "precision": "bfloat16"},
    "gradient": {"method": "gradient", "packing": True},
    "random": {"mode": "masked-finetuning", "method": "random", "task": "wikitext2", "schedule": "set"},
}
"""A covering set: every mode, a method and a task of each kind, both precisions, masks that stay and that change."""
UPDATES = {
    "set": ScheduleSettings(update_every=1),
    "rigl": ScheduleSettings(update_every=1),
    "gradual": ScheduleSettings(gradual_updates=1, update_to=1.0, revivable=True),
}
"""One, after the first or the last step."""
RARER: dict[str, dict[str, Any]] = {
    "recovered": {"method": "wanda", "recover": "reconstruct", "calibration_window": 32, "precision": "bfloat16"},
    "sequential": {"method": "sparsegpt", "calibration_order": "sequential", "task": "gsm8k"},
    "2:4": {"mode": "sparse-to-dense", "method": "wanda-2:4", "precision": "bfloat16", "packing": True},
    "global": {
        "mode": "masked-finetuning",
        "method": "magnitude-global",
        "task": "hellaswag",
        "schedule": "gradual",
        "precision": "bfloat16",
    },
    "taylor": {"method": "taylor", "task": "wikitext2", "precision": "bfloat16", "checkpoints": True},
    "dense text": {"mode": "dense", "method": "none", "sparsity": 0.0, "task": "wikitext2", "packing": True},
}


@dataclass(frozen=True)
class Ran:
    """A cell on the device, and the same one on the CPU."""

    here: Record
    on_cpu: Record
    steps: list[Counter[str]]
    """waits of each optimizer step but the first, which prunes and scores too, and the last, which has an eval loss"""
    waits: Counter[str]
    """of the whole cell"""
    matrices: int


def run_both(model: Path, data_dir: Path, folder: Path, changes: dict[str, Any]) -> Ran:
    """Attention is composed of simple operations, which are the same on both."""
    own = dict(changes)
    checkpointing = ALWAYS if own.pop("checkpoints", False) else NEVER
    data = {"data_dir": data_dir} if own.get("task") == "wikitext2" else {}
    steps = {"steps": STEPS, "eval_every": STEPS, "global_batch_size": 8, "max_tokens": TOKENS}
    run = tiny_run(model, **data | steps | {"max_new_tokens": NEW_TOKENS, "calibration_tokens": CALIBRATION * 24} | own)
    run = replace(run, budgets=BudgetOptions(TOKENS, activation_checkpointing=checkpointing))
    run = replace(run, schedule_settings=UPDATES.get(run.cell.schedule, ScheduleSettings()))
    with sdpa_kernel(SDPBackend.MATH):
        on_cpu = finished(run, Ledger(folder / "cpu"))
        with simulated_device() as activity:
            here, by_step = _followed(run, Ledger(folder / "device"), activity)
    return Ran(here, on_cpu, by_step[1:-1], activity.waits, len(WorkerCache().model(run).dense_weights))


def _followed(run: Run, ledger: Ledger, activity: Activity) -> tuple[Record, list[Counter[str]]]:
    by_step, before, steps = list[Counter[str]](), Counter(activity.waits), run_cell(run, ledger, WorkerCache())
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, by_step
        by_step.append(activity.waits - before)
        before = Counter(activity.waits)


Cell = Callable[[str], Ran]


@pytest.fixture(scope="module")
def cell(
    device_process: ProcessPoolExecutor,
    llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Cell:
    """Each cell, run once."""
    ran: dict[str, Ran] = {}

    def get(name: str) -> Ran:
        if name not in ran:
            folder = tmp_path_factory.mktemp("cell")
            arguments = llama, Path(__file__).parent / "data", folder, (CELLS | RARER)[name]
            ran[name] = device_process.submit(run_both, *arguments).result()
        return ran[name]

    return get


NAMES = [*CELLS, *(pytest.param(name, marks=pytest.mark.slow) for name in RARER)]


def test_the_cells_have_every_mode_precision_and_kind() -> None:
    def values(name: str, default: str) -> set[str]:
        return {changes.get(name, default) for changes in CELLS.values()}

    assert values("mode", "sparse-to-sparse") == set(MODES)
    assert values("precision", "float32") == {"float32", "bfloat16"}
    assert values("task", "boolq") == {"boolq", "hellaswag", "gsm8k", "wikitext2"}


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_is_done_and_valid_with_the_numbers_of_the_cpu(name: str, cell: Cell) -> None:
    ran = cell(name)
    assert (ran.here.status, ran.here.error) == ("done", None)
    assert ran.here.metrics == ran.on_cpu.metrics


@pytest.mark.parametrize("name", NAMES)
def test_the_host_waits_at_most_twice_in_an_optimizer_step(name: str, cell: Cell) -> None:
    for waits in cell(name).steps:
        assert waits.total() <= 2, waits


def test_the_host_waits_at_most_once_in_16_generated_tokens(cell: Cell) -> None:
    waits = waits_in(cell("sparsegpt"), "tune_sparse/evaluation/generation.py")
    scorings = 3  # before tuning, before the last mask, after it
    assert waits.total() <= scorings * NEW_TOKENS / 16, waits


@pytest.mark.parametrize("name", NAMES)
def test_the_host_waits_a_few_times_for_a_matrix(name: str, cell: Cell) -> None:
    """From load to record: each is read, pruned, set up, saved, merged and hashed; and dropped and grown where masks
    change. Gradients also go to the host, from every calibration example."""
    ran, changes = cell(name), (CELLS | RARER)[name]
    more = CALIBRATION if changes["method"] in ("gradient", "taylor") else 0
    more += FOR_AN_UPDATE if "schedule" in changes else 0
    assert sum(ran.waits.values()) <= (FOR_A_MATRIX + more) * ran.matrices, ran.waits.most_common(20)


def use_device() -> tuple[str, list[int]]:
    """What a mix of devices raises, and the waits after each of some operations."""
    with simulated_device() as activity:
        there, waits = torch.ones(2, 3).to(DEVICE), []
        operations: list[Callable[[], object]] = [
            lambda: torch.ones(2).to(DEVICE, non_blocking=True) @ there,
            lambda: torch.ones(2).to(DEVICE),
            lambda: there.cpu(),
            lambda: there.sum().item(),
            lambda: there[there > 0],
            lambda: there.sum(0).mul_(2) + 1,
        ]
        for operation in operations:
            before = activity.waits.total()
            operation()
            waits.append(activity.waits.total() - before)
        with pytest.raises(RuntimeError) as raised:
            there + torch.ones(2, 3)
    return str(raised.value), waits


def test_the_device_refuses_to_mix_and_counts_waits(device_process: ProcessPoolExecutor) -> None:
    message, waits = device_process.submit(use_device).result()
    assert message.startswith("Expected all tensors to be on the same device, got cpu tensors [(2, 3)]")
    assert waits == [0, 1, 1, 1, 1, 0]


def waits_in(ran: Ran, *files: str) -> Counter[str]:
    return Counter({line: count for line, count in ran.waits.items() if line.startswith(files)})
