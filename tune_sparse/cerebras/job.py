"""A training as the files that a program in the Cerebras environment reads, and the files that it leaves.

job.json              the protocol, and the places of
base.json             the converted checkpoint, dense, and of
masks.safetensors     keep-masks, eight weights a byte
weights.safetensors   matrices whose kept weights are not those of the checkpoint (a method that updates weights)
adapter_start.safetensors   A (R, I) and B (O, R) that the training begins with, if it trains adapters
start.mdl, resumed.mdl, model_dir/   what it works with, gone when it has ended
restart.mdl, restart.json   a checkpoint and its step, where a training that was lost may go on
metrics.jsonl         a line a step
trained.safetensors   A and B, or the matrices, as trained
trained_masks.safetensors   bool masks that the training ended with, where a schedule changed them
report.json           seconds, steps, and whether the frozen weights are what they were
child.log             its output
cerebras_logs/        the client's own records of a job that failed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tune_sparse.cerebras.content_cache import cached
from tune_sparse.cerebras.sparsity import ChangingMasks
from tune_sparse.config import Cerebras, Protocol
from tune_sparse.config.cerebras import LEFT_OUT, ROUNDED, ROUNDED_WITHIN
from tune_sparse.data.batching import as_batch, example_tokens
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.files import write_json
from tune_sparse.models.model_zoo import cerebras_name, hugging_face_name, interleaved, separated
from tune_sparse.models.safetensors_io import TensorFiles, TensorWriter
from tune_sparse.pruning.bit_masks import BitMasks, pack_bits
from tune_sparse.training.loop import batches

CHILD = Path(__file__).parent / "child.py"
TRAINED, TRAINED_MASKS = "trained.safetensors", "trained_masks.safetensors"
CLUSTER_OPTIONS = (
    *("num_csx", "mount_dirs", "python_paths", "automount"),
    *("num_workers_per_csx", "job_priority", "disable_version_check"),
)
"""Settings that the client's ClusterConfig has too. Its limit of time is not used: that one counts compiling."""


@dataclass(frozen=True)
class Start:
    """The state that a training begins with. Matrices are named as in the Hugging Face checkpoint."""

    masks: BitMasks
    """(O, I)"""
    updated: Mapping[str, Tensor]
    """matrices whose kept weights are not those of the checkpoint: (O, I)"""
    adapters: Mapping[str, tuple[Tensor, Tensor]]
    """A: (R, I), B: (O, R). Without any, the matrices themselves are trained."""
    update_is_masked: bool
    head_dim: int
    sparsity: float
    """that was asked for, of which each matrix has its own"""
    changing: ChangingMasks | None = None
    """How masks change; None where they stay"""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.masks.shapes

    @property
    def kept(self) -> Mapping[str, Mapping[str, list[int]]]:
        """The counts of `ChangingMasks`, by names of Model Zoo; nothing where masks stay."""
        counts = self.changing.counts(self.shapes, self.masks.kept) if self.changing else {}
        return {kind: {cerebras_name(n): found for n, found in known.items()} for kind, known in counts.items()}


def write_job(
    folder: Path,
    examples: Path,
    start: Start,
    protocol: Protocol,
    seed: int,
    settings: Cerebras,
    job_labels: Sequence[str],
    restart: Mapping[str, Any] | None = None,
    compile_only: bool = False,
) -> None:
    """Write a training into a folder. restart: the checkpoint, and its step, from which the training goes on."""
    shapes, counts = start.shapes, start.kept
    sparsities = write_masks(folder / "masks.safetensors", start)
    for name, shape in shapes.items() if start.changing else ():
        sparsities[cerebras_name(name)] = 1 - counts["kept"][cerebras_name(name)][-1] / prod(shape)
    if start.updated:
        write_updated(folder / "weights.safetensors", start)
    if start.adapters:
        save_file(named_adapters(start.adapters, start.head_dim), folder / "adapter_start.safetensors")
    places = {
        "examples": str(examples.resolve()),
        "masks": str((folder / "masks.safetensors").resolve()),
        "weights": str((folder / "weights.safetensors").resolve()) if start.updated else None,
        "adapter": str((folder / "adapter_start.safetensors").resolve()) if start.adapters else None,
        "shapes": {cerebras_name(name): list(shape) for name, shape in shapes.items()},
    }
    trained = {
        "trains": "adapters" if start.adapters else "weights",
        "update_is_masked": start.update_is_masked,
        "pruned": [name for name, sparsity in sparsities.items() if sparsity],
        "annotated": annotated_sparsities(sparsities, start.sparsity, settings.sparsity_annotation),
        "changes": start.changing.job(counts) if start.changing else None,
    }
    went = {"checkpoint_steps": settings.checkpoint_steps, "restart": restart}
    job = places | trained | went | job_protocol(protocol, seed) | job_appliance(settings, job_labels, compile_only)
    write_json(folder / "job.json", job)


def write_masks(path: Path, start: Start) -> dict[str, float]:
    """Write the masks as packed bits, one matrix in memory at a time; returns {name of Model Zoo: its sparsity}."""
    sparsities: dict[str, float] = {}
    declared = {cerebras_name(n): ((-(-prod(shape) // 8),), torch.uint8) for n, shape in start.shapes.items()}
    with TensorWriter(path, declared) as writer:
        for name, mask in start.masks.items():
            writer.write(cerebras_name(name), pack_bits(interleaved(name, mask.cpu(), start.head_dim)))
            sparsities[cerebras_name(name)] = 1 - float(mask.sum()) / mask.numel()
        writer.done()
    return sparsities


def write_updated(path: Path, start: Start) -> None:
    """Write the matrices whose kept weights are not those of the checkpoint, one in memory at a time."""
    declared = {cerebras_name(n): (start.shapes[n], start.updated[n].dtype) for n in start.updated}
    with TensorWriter(path, declared) as writer:
        for name, weight in start.updated.items():
            writer.write(cerebras_name(name), interleaved(name, weight.cpu(), start.head_dim))
        writer.done()


def annotated_sparsities(sparsities: Mapping[str, float], asked: float, kind: str) -> dict[str, float]:
    """Return the sparsity that the compiler is told of each matrix, nothing of those that it is not told of.

    Raises `InputError` for a matrix that is further from the sparsity asked for than a rounded annotation may be.
    """
    if kind == LEFT_OUT or not any(sparsities.values()):
        return {}
    if kind != ROUNDED:
        return {name: sparsity for name, sparsity in sparsities.items() if sparsity}
    name, worst = max(sparsities.items(), key=lambda item: abs(item[1] - asked))
    if abs(worst - asked) > ROUNDED_WITHIN:
        raise InputError(
            f"an annotation rounded to {asked} must be within {ROUNDED_WITHIN} of the sparsity of every matrix, {name} "
            f"has {worst:.4f}. Give --sparsity-annotation exact, or none."
        )
    return dict.fromkeys(sparsities, asked)


def job_protocol(protocol: Protocol, seed: int) -> dict[str, Any]:
    return {
        "steps": protocol.steps,
        "batch_size": protocol.global_batch_size,
        "rank": protocol.lora_rank,
        "alpha": protocol.lora_alpha,
        "dropout": protocol.lora_dropout,
        "learning_rate": protocol.learning_rate,
        "final_learning_rate": protocol.final_learning_rate,
        "warmup_steps": protocol.warmup,
        "betas": [protocol.beta1, protocol.beta2],
        "weight_decay": protocol.weight_decay,
        "max_grad_norm": protocol.max_grad_norm,
        "precision": protocol.precision,
        "seed": seed,
    }


def job_appliance(settings: Cerebras, job_labels: Sequence[str], compile_only: bool = False) -> dict[str, Any]:
    micro_batch = settings.csx_micro_batch_size
    return {
        "target": settings.cerebras_target,
        "cluster": _cluster_options(settings) | {"job_labels": list(job_labels)},
        "half_precision": settings.half_precision,
        "compile_dir": settings.compile_dir,
        "compile_only": compile_only,
        "micro_batch_size": int(micro_batch) if micro_batch.isdecimal() else micro_batch,
    }


def _cluster_options(settings: Cerebras) -> dict[str, Any]:
    """Return what the client's ClusterConfig is given. Older clients know fewer options: defaults are left out."""
    values = {name: getattr(settings, name) for name in CLUSTER_OPTIONS}
    chosen = {name: value for name, value in values.items() if value != getattr(Cerebras, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def examples_in_order(
    examples: Sequence[Encoded], protocol: Protocol, seed: int, bucket_tokens: Sequence[int] = ()
) -> Path:
    """A folder of the cache with the examples of every step, in the order in which the torch backend trains on them.

    `tokens.safetensors` has each example once and the order; the child makes of it the HDF5 file that Model Zoo reads.
    """
    width = padded_tokens(longest_tokens(examples), bucket_tokens)
    tokens = encoded_tokens(examples, protocol.train_on_prompt, width)
    order = step_order(examples, protocol, seed)
    content = hashlib.sha256(tokens.numpy().tobytes() + repr((tuple(tokens.shape), order)).encode()).hexdigest()

    def write(folder: Path) -> None:
        save_file({"examples": tokens, "order": torch.tensor(order)}, folder / "tokens.safetensors")

    return cached(f"examples-{content[:32]}", write)


def longest_tokens(examples: Sequence[Encoded]) -> int:
    """Count the tokens of the longest example without its last one, after which nothing is predicted."""
    return max(map(example_tokens, examples)) - 1


def padded_tokens(longest: int, bucket_tokens: Sequence[int]) -> int:
    """The shortest bucket that holds `longest` tokens, or as many where there are no buckets.

    Raises `InputError` if every bucket is shorter.
    """
    if not bucket_tokens:
        return longest
    holding = [tokens for tokens in bucket_tokens if tokens >= longest]
    if not holding:
        raise InputError(
            f"a bucket must hold the longest example, which has {longest} tokens, the longest of bucket_tokens has "
            f"{max(bucket_tokens)}. Add {longest}, or lower max_tokens."
        )
    return min(holding)


def encoded_tokens(examples: Sequence[Encoded], train_on_prompt: bool, width: int) -> Tensor:
    """(N, 3, width) int32: input ids, loss mask, the ids that follow. What follows an example is never looked at."""
    batch = as_batch([(example,) for example in examples], train_on_prompt)
    inputs, labels, loss_mask = batch.ids[:, :-1], batch.ids[:, 1:], batch.predicts_target()[:, :-1]
    tokens = torch.stack([inputs, loss_mask.long(), labels], dim=1).to(torch.int32)
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[2]))


def step_order(examples: Sequence[Encoded], protocol: Protocol, seed: int) -> list[int]:
    """Positions in `examples` of every example of every step: those of `tune_sparse.training.loop.batches`."""
    position = {id(example): at for at, example in enumerate(examples)}
    steps = batches(examples, protocol, seed)
    return [position[id(example)] for _ in range(protocol.steps) for example in next(steps)]


def new_lines(path: Path, after: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines of a growing file of JSON from the byte `after` on, and where they end."""
    if not path.exists():
        return [], after
    with path.open("rb") as stream:
        stream.seek(after)
        whole = stream.read().rpartition(b"\n")
    return [json.loads(line) for line in whole[0].splitlines()], after + len(whole[0]) + len(whole[1])


def trained_adapters(folder: Path, head_dim: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R, I) and B (O, R) as trained, by the matrices' names in the Hugging Face checkpoint."""
    tensors = load_file(folder / TRAINED)
    found = {}
    for name in tensors:
        if name.endswith("lora_A"):
            module = name.removesuffix("lora_A")
            weight = hugging_face_name(f"{module}weight")
            found[weight] = (tensors[name], separated(weight, tensors[f"{module}lora_B"], head_dim))
    return found


def trained_weights(folder: Path, head_dim: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each trained matrix (O, I) by its name in the Hugging Face checkpoint, read when it is asked for."""
    tensors = TensorFiles([folder / TRAINED])
    for name in tensors:
        weight = hugging_face_name(name)
        yield weight, separated(weight, tensors[name], head_dim)


def trained_masks(folder: Path, head_dim: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the mask (O, I) that each pruned matrix ended with, as `trained_weights` does."""
    tensors = TensorFiles([folder / TRAINED_MASKS])
    for name in tensors:
        weight = hugging_face_name(name)
        yield weight, separated(weight, tensors[name], head_dim)


def named_adapters(adapters: Mapping[str, tuple[Tensor, Tensor]], head_dim: int) -> dict[str, Tensor]:
    """A (R, I) and B (O, R) under Model Zoo's names, the rows of B in its order."""
    named: dict[str, Tensor] = {}
    for weight, (A, B) in adapters.items():
        module, rows = cerebras_name(weight).removesuffix("weight"), interleaved(weight, B, head_dim)
        named |= {f"{module}lora_A": A.detach().cpu().contiguous(), f"{module}lora_B": rows.detach().cpu().contiguous()}
    return named
