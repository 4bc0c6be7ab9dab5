"""The GPUs that a sweep can use, and the refusal of what none of them can hold, before anything is computed."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tune_sparse.config import SweepConfig
from tune_sparse.errors import InputError, TooLargeError
from tune_sparse.evaluation.card_budgets import budgets_for
from tune_sparse.evaluation.cards import MIB, find_card
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.ledger.run import Run
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.other_weights import all_weights
from tune_sparse.sweep.resources import ACCELERATOR_TYPE

Block = tuple[str, str]
"""Model and task: what is compared with each other."""
LARGE_WEIGHTS = 1e9
"""A model of more weights takes hours for what a GPU does in seconds: nobody trains it on a CPU on purpose."""
BFLOAT16_CAPABILITY = 8.0
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Device:
    """A GPU that is there."""

    name: str
    memory_bytes: int
    has_bfloat16: bool


def local_devices() -> tuple[Device, ...]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible, from their driver: no context is made."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.count(",") == 4]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(
        Device(name, int(float(memory)) * MIB, float(capability) >= BFLOAT16_CAPABILITY)
        for index, uuid, name, memory, capability in rows
        if visible is None or _is_visible(index, uuid, visible)
    )


def _is_visible(index: str, uuid: str, visible: str) -> bool:
    return any(part and (part == index or uuid.startswith(part)) for part in visible.replace(" ", "").split(","))


def cluster_devices(nodes: Iterable[Mapping[str, float]]) -> tuple[Device, ...]:
    """The kinds of GPU that a Ray cluster names, as far as the table of cards knows them: one of each."""
    found = {kind: find_card(kind) for node in nodes for kind in gpu_kinds(node)}
    return tuple(Device(kind, card.memory_bytes, card.has_bfloat16) for kind, card in found.items() if card)


def gpu_kinds(node: Mapping[str, float]) -> list[str]:
    """The kinds of GPU of a node, by the names that Ray gives them."""
    return [
        name.removeprefix(ACCELERATOR_TYPE) for name in node if name.startswith(ACCELERATOR_TYPE) and node.get("GPU")
    ]


def block_kinds(
    config: SweepConfig,
    runs: Sequence[Run],
    dims: Mapping[str, ModelDims],
    nodes: Sequence[Mapping[str, float]],
    hardware: Mapping[Block, str],
) -> dict[Block, str]:
    """{(model, task): kind of GPU} where a cluster has several kinds: what is compared is rounded alike.

    Blocks are shared out by the GPUs of each kind, among those that can hold all their runs. hardware: {block: the name
    of a card on which runs of it finished}, where the others then go too. Empty where there is one kind, or no GPU is
    asked for.
    """
    gpus: Counter[str] = Counter()
    for node in nodes:
        gpus.update({kind: round(node["GPU"]) for kind in gpu_kinds(node)})
    if len(gpus) < 2 or not gpus_asked(config):
        return {}
    blocks: dict[Block, list[Run]] = {}
    for run in runs:
        if run.cerebras is None:
            blocks.setdefault((run.cell.model, run.cell.task), []).append(run)
    load, found = dict.fromkeys(gpus, 0), dict[Block, str]()
    for block, members in sorted(blocks.items(), key=lambda item: -len(item[1])):
        able = [kind for kind in gpus if _holds(config, members, dims, kind)] or list(gpus)
        before = [kind for kind in able if kind.split("-")[0] in hardware.get(block, "")]
        found[block] = min(before or able, key=lambda kind: (load[kind] + len(members)) / gpus[kind])
        load[found[block]] += len(members)
    return found


def _holds(config: SweepConfig, runs: Sequence[Run], dims: Mapping[str, ModelDims], kind: str) -> bool:
    """Whether a kind of GPU can hold runs; one that the table of cards lacks may."""
    try:
        check_devices(config, runs, dims, cluster_devices([{"GPU": 1.0, f"{ACCELERATOR_TYPE}{kind}": 1.0}]))
    except InputError:
        return False
    return True


def gpus_asked(config: SweepConfig) -> float:
    """What a trial holds of a GPU before the memory of its kind was measured."""
    return 1.0 if config.gpus_per_trial is None else config.gpus_per_trial


def check_devices(
    config: SweepConfig, runs: Sequence[Run], dims: Mapping[str, ModelDims], devices: Sequence[Device]
) -> None:
    """Raise `InputError` if a run of the backend torch can be trained on none of these GPUs, with what to change.

    dims: {short name of a model: its sizes}. devices: none of them where nothing is known.
    """
    trained = [run for run in runs if run.cerebras is None]
    if not devices or not trained:
        return
    share = gpus_asked(config)
    if not share:
        _check_no_gpu_wanted(trained, dims, devices)
        return
    able = [device for device in devices if device.has_bfloat16 or config.protocol.precision != "bfloat16"]
    if not able:
        raise InputError(
            f"precision bfloat16 needs a GPU that computes in it, got {describe_devices(devices)}. "
            "Set precision=float32, or take a card of compute capability 8.0 or higher."
        )
    largest = max(able, key=lambda device: device.memory_bytes)
    cells = dict.fromkeys((run.cell.model, memory_of_run(run, dims)) for run in trained)
    for model, cell in cells:
        try:
            budgets_for(largest.memory_bytes, share, cell, config.budgets)
        except TooLargeError as error:
            raise TooLargeError(f"{model} on {largest.name}: {error}") from error


def memory_of_run(run: Run, dims: Mapping[str, ModelDims]) -> CellMemory:
    """dims: {short name of a model: its sizes}"""
    cell = run.cell
    return CellMemory(dims[cell.model], cell.mode, cell.method, run.own_protocol, cell.sparsity, cell.schedule)


def _check_no_gpu_wanted(runs: Sequence[Run], dims: Mapping[str, ModelDims], devices: Sequence[Device]) -> None:
    for model in dict.fromkeys(run.cell.model for run in runs):
        if all_weights(dims[model]) > LARGE_WEIGHTS:
            raise InputError(
                f"a model of more than {LARGE_WEIGHTS:.0e} weights needs a GPU, {model} has "
                f"{all_weights(dims[model]) / 1e9:.1f}e9, and with --gpus-per-trial 0 trials compute on the CPU beside "
                f"{describe_devices(devices)}. Give --gpus-per-trial 1, or none to share a GPU; hide the GPUs "
                "with CUDA_VISIBLE_DEVICES= to insist on the CPU."
            )


def describe_devices(devices: Iterable[Device]) -> str:
    """For people: each kind once."""
    return ", ".join(dict.fromkeys(f"{d.name} of {d.memory_bytes / 1e9:.0f} GB" for d in devices))
