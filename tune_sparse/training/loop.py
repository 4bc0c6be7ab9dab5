"""The training loop: answers learned by cosine-scheduled AdamW, the batch accumulated over micro-batches."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tune_sparse.config import Protocol
from tune_sparse.data.batching import Batch, example_tokens, micro_batches, sent
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import RunError
from tune_sparse.training.budgets import CPU_BUDGETS, Budgets
from tune_sparse.training.cross_entropy import summed_cross_entropy
from tune_sparse.training.no_cache import NoCache
from tune_sparse.watchdog import heartbeat


@dataclass(frozen=True)
class Step:
    """The outcome of one optimizer step."""

    step: int
    loss: float
    """Mean cross-entropy over the batch's target tokens, before the step."""
    learning_rate: float
    examples: int
    tokens: int
    seconds: float


class StepHooks:
    """What a training does besides in each optimizer step, whose number counts from 1: by default nothing."""

    def before(self, step: int) -> None:
        """Called before the first forward pass."""

    def clip(self, step: int, parameters: list[Tensor], max_norm: float) -> None:
        """Clip the accumulated gradients, in place."""
        clip_grad_norm_(parameters, max_norm)

    def after(self, step: int) -> None:
        """Called once the optimizer has stepped, its gradients still there."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: plain values and tensors."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""

    def summary(self) -> dict[str, float]:
        """Return what a result keeps of it, which must not depend on the machine."""
        return {}


NO_HOOKS = StepHooks()


def cosine(angle: float, start: float, end: float = 0.0) -> float:
    """Fall from `start` at angle 0 to `end` at angle pi (Loshchilov & Hutter 2017, eq. 5)."""
    return end + (start - end) * (1 + math.cos(angle)) / 2


def learning_rate_at(step: int, protocol: Protocol) -> float:
    """Linear warm-up, then a cosine from the peak to the final rate. step: from 0."""
    if step < protocol.warmup:
        return protocol.learning_rate * (step + 1) / protocol.warmup
    done = (step - protocol.warmup) / max(1, protocol.steps - 1 - protocol.warmup)
    return cosine(math.pi * done, protocol.learning_rate, protocol.final_learning_rate)


def batches(examples: Sequence[Encoded], protocol: Protocol, seed: int) -> Iterator[list[Encoded]]:
    """Global batches without end: each epoch in a new order, from `seed` alone."""
    shuffled = random.Random(seed)
    order: list[Encoded] = []
    while True:
        while len(order) < protocol.global_batch_size:
            order += shuffled.sample(examples, len(examples))
        yield order[: protocol.global_batch_size]
        order = order[protocol.global_batch_size :]


def answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Summed cross-entropy of a batch's targets, on the device of the model; nothing waits for it.

    Logits are computed only where a token is a target, a chunk at a time.
    """
    ids, places, targets = (sent(t, model.device) for t in (batch.ids, batch.places, batch.targets))
    hidden = model.model(input_ids=ids, use_cache=False, **_attention(model, batch)).last_hidden_state
    return summed_cross_entropy(hidden.flatten(0, 1).index_select(0, places), model.lm_head, targets)


def _attention(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments by which attention stays within each example. From positions alone transformers would look for the
    examples of a sequence, and wait for the device."""
    if batch.positions is None:
        return {"past_key_values": NoCache()}
    positions = sent(batch.positions, model.device)
    mask = packed_mask(positions, getattr(model.config, "sliding_window", None))
    return {"position_ids": positions, "attention_mask": mask[:, None]}


def packed_mask(positions: Tensor, window: int | None) -> Tensor:
    """Which key each query sees: (B, T, T) of bool, from the position of each token in its own example, (B, T).

    An example begins where a position does not follow the one before. With a sliding window a token sees the last
    `window` tokens of its example.
    """
    example = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    query, key = positions[:, :, None], positions[:, None, :]
    seen = (example[:, :, None] == example[:, None, :]) & (key <= query)
    return seen if window is None else seen & (key > query - window)


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    protocol: Protocol,
    accelerator: Accelerator | None = None,
    budgets: Budgets = CPU_BUDGETS,
) -> float:
    """Mean cross-entropy over the target tokens of `examples`, in evaluation mode. Raises `RunError` if not finite."""
    losses, targets, was_training = [], 0, model.training
    model.eval()
    for batch in micro_batches(examples, budgets.scoring_tokens, protocol.train_on_prompt, protocol.pack_to):
        with accelerator.autocast() if accelerator else nullcontext():
            losses.append(answer_loss(model, batch))
        heartbeat()
        targets += len(batch.targets)
    model.train(was_training)
    mean = math.fsum(torch.stack(losses).tolist()) / targets
    if not math.isfinite(mean):
        raise RunError(f"the eval loss must stay finite, got {mean}. Lower learning_rate.")
    return mean


def adamw(parameters: Sequence[Tensor], protocol: Protocol, without_decay: Sequence[Tensor] = ()) -> torch.optim.AdamW:
    """The protocol's optimizer (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if without_decay:
        groups.append({"params": list(without_decay), "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=protocol.learning_rate,
        betas=(protocol.beta1, protocol.beta2),
        weight_decay=protocol.weight_decay,
        fused=True,
    )


def accelerator_for(mixed_precision: str = "no") -> Accelerator:
    """Where a training computes, and whether in mixed precision ("no" or "bf16").

    A process has one accelerator state; a warm worker goes from one precision to another, so it begins anew.
    """
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed_precision)


def fit(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Encoded],
    protocol: Protocol,
    seed: int,
    done: int = 0,
    accelerator: Accelerator | None = None,
    hooks: StepHooks = NO_HOOKS,
    budgets: Budgets = CPU_BUDGETS,
) -> Iterator[Step]:
    """Train the optimizer's parameters of `model` in place, one `Step` yielded after each optimizer step.

    `done` steps were taken before, and their optimizer and random state restored. The model is in training mode until
    the iterator ends. Raises `RunError` as soon as a loss is not finite.
    """
    accelerator = accelerator or accelerator_for()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not done:
        torch.manual_seed(seed)
    last_good = "no good loss before"
    with in_training(model, budgets.activation_checkpointing):
        for step, batch in enumerate(islice(batches(examples, protocol, seed), done, protocol.steps), start=done):
            start = time.perf_counter()
            hooks.before(step + 1)
            rate = learning_rate_at(step, protocol)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _accumulate_gradients(model, batch, protocol, accelerator, budgets.micro_batch_tokens)
            if not math.isfinite(loss):
                raise RunError(
                    f"the training loss must stay finite, got {loss} at step {step + 1} with learning rate {rate:g} "
                    f"({last_good}). Lower learning_rate."
                )
            last_good = f"last good loss {loss:.4g} at step {step + 1}"
            hooks.clip(step + 1, parameters, protocol.max_grad_norm)
            optimizer.step()
            hooks.after(step + 1)
            optimizer.zero_grad()
            tokens = sum(map(example_tokens, batch))
            yield Step(step + 1, loss, rate, len(batch), tokens, time.perf_counter() - start)


@contextmanager
def in_training(model: PreTrainedModel, checkpoint_activations: bool) -> Iterator[None]:
    """A model in training mode, and in evaluation mode after the block.

    With checkpointing it keeps one activation a decoder block and computes the others again in the backward.
    """
    model.train()
    if checkpoint_activations:
        model.activation_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._can_checkpoint_with_cache = True  # it is a `NoCache`, which a second forward may see again
    try:
        yield
    finally:
        if checkpoint_activations:
            model.activation_checkpointing_disable()
        model.eval()


def _accumulate_gradients(
    model: PreTrainedModel, examples: Sequence[Encoded], protocol: Protocol, accelerator: Accelerator, tokens: int
) -> float:
    """Gradients of the mean loss over all target tokens of `examples`, in micro-batches of at most `tokens` tokens.

    The device is waited for once, for the loss.
    """
    parts = micro_batches(examples, tokens, protocol.train_on_prompt, protocol.pack_to)
    targets = sum(len(part.targets) for part in parts)
    losses = []
    for part in parts:
        with accelerator.autocast():
            loss = answer_loss(model, part)
        accelerator.backward(loss / targets)
        heartbeat()
        losses.append(loss.detach())
    return math.fsum(torch.stack(losses).tolist()) / targets
