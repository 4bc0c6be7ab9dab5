"""The training loop: answers learned by cosine-scheduled AdamW, the batch accumulated over micro-batches."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.data import Encoded
from tune_sparse.errors import RunError


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int
    loss: float
    """Mean cross-entropy over the batch's learned tokens, before the step."""
    learning_rate: float
    rows: int
    tokens: int
    seconds: float


def learning_rate_at(step: int, protocol: Protocol) -> float:
    """Linear warm-up, then a cosine from the peak to the final rate (Loshchilov & Hutter 2017, eq. 5). step: from 0."""
    if step < protocol.warmup:
        return protocol.learning_rate * (step + 1) / protocol.warmup
    done = (step - protocol.warmup) / max(1, protocol.steps - 1 - protocol.warmup)
    fall = protocol.learning_rate - protocol.final_learning_rate
    return protocol.final_learning_rate + fall * (1 + math.cos(math.pi * done)) / 2


def batches(rows: Sequence[Encoded], protocol: Protocol, seed: int) -> Iterator[list[Encoded]]:
    """Global batches without end: each epoch in a new order, from `seed` alone."""
    shuffled = random.Random(seed)
    order: list[Encoded] = []
    while True:
        while len(order) < protocol.global_batch:
            order += shuffled.sample(rows, len(rows))
        yield order[: protocol.global_batch]
        order = order[protocol.global_batch :]


def answer_loss(model: PreTrainedModel, rows: Sequence[Encoded], loss_on: str = "answer") -> tuple[Tensor, int]:
    """Summed cross-entropy of the learned tokens and how many they are.

    Rows are padded on the right, where a causal model never looks. Logits are computed only where a token is
    learned: (learned tokens, vocabulary).
    """
    width = max(len(row.context) + len(row.continuation) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        text = row.context + row.continuation
        ids[i, : len(text)] = torch.tensor(text)
        first = max(1, len(row.context)) if loss_on == "answer" else 1
        learned[i, first : len(text)] = True
    ids, learned = ids.to(model.device), learned.to(model.device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])
    targets = ids[learned]
    return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Sequence[Encoded], protocol: Protocol) -> float:
    """Mean cross-entropy over the learned tokens of `rows`. Raises `RunError` if it is not finite."""
    parts = [
        answer_loss(model, rows[start : start + protocol.micro_batch], protocol.loss_on)
        for start in range(0, len(rows), protocol.micro_batch)
    ]
    mean = sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts)
    if not math.isfinite(mean):
        raise RunError(f"the eval loss must stay finite, got {mean}. Lower learning_rate.")
    return mean


def fit(
    model: PreTrainedModel, parameters: Sequence[nn.Parameter], rows: Sequence[Encoded], protocol: Protocol, seed: int
) -> Iterator[Step]:
    """Train `parameters` of `model` in place, one `Step` yielded after each optimizer step.

    Raises `RunError` as soon as a loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        lr=protocol.learning_rate,
        betas=(protocol.beta1, protocol.beta2),
        weight_decay=protocol.weight_decay,
        fused=True,
    )
    torch.manual_seed(seed)
    for step, batch in zip(range(protocol.steps), batches(rows, protocol, seed), strict=False):
        start = time.perf_counter()
        rate = learning_rate_at(step, protocol)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss = _accumulate_gradients(model, batch, protocol)
        model.eval()
        if not math.isfinite(loss):
            raise RunError(f"the training loss must stay finite, got {loss} at step {step + 1}. Lower learning_rate.")
        nn.utils.clip_grad_norm_(parameters, protocol.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(row.context) + len(row.continuation) for row in batch)
        yield Step(step + 1, loss, rate, len(batch), tokens, time.perf_counter() - start)


def _accumulate_gradients(model: PreTrainedModel, batch: Sequence[Encoded], protocol: Protocol) -> float:
    """Gradients of the mean loss over all learned tokens of the batch, whatever the micro-batch."""
    if protocol.loss_on == "answer":
        learned = sum(len(row.continuation) - (not row.context) for row in batch)
    else:
        learned = sum(len(row.context) + len(row.continuation) - 1 for row in batch)
    total = 0.0
    for start in range(0, len(batch), protocol.micro_batch):
        loss, _ = answer_loss(model, batch[start : start + protocol.micro_batch], protocol.loss_on)
        (loss / learned).backward()
        total += loss.item()
    return total / learned
