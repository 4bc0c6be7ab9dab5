"""The parts of `bench_gpu`: cells stage by stage, layers, generation and scoring, on random weights of a 7B's shapes.

Imports what lies below the ledger, so that neither Ray nor MLflow nor a data set is needed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bench_lora import layer_row, peft_model
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from random_inputs import RandomExamples
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaConfig, PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.data.batching import Batch, batches_by_length, example_tokens, micro_batches
from tune_sparse.data.splits import Encoded
from tune_sparse.evaluation.card_budgets import budgets_for
from tune_sparse.evaluation.generation import generate
from tune_sparse.evaluation.likelihood import log_likelihoods, question_tokens
from tune_sparse.evaluation.memory import CellMemory
from tune_sparse.evaluation.validation import hashing, validation_report
from tune_sparse.lora.layer import adapt_model, count_impls
from tune_sparse.lora.masked_linear import keep_for_steps
from tune_sparse.lora.merging import mask_weights_into, merge_adapters_into
from tune_sparse.models.checkpoints import load_model, prunable_weights
from tune_sparse.models.dense_weights import DenseWeights
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.safetensors_io import TensorFiles, weight_files
from tune_sparse.modes import ADAPTER_MODES, DENSE, MODES
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.masks import MaskedWeights
from tune_sparse.pruning.prune_into import prune_into
from tune_sparse.training.budgets import Budgets, cpu_budgets
from tune_sparse.training.loop import Step, adamw, batches, fit, in_training

METHOD, SPARSITY = "unstructured", 0.5


@dataclass(frozen=True)
class Setting:
    """How large everything is."""

    model: Mapping[str, int]
    steps: int
    batch: int
    """examples of a step, and of everything that is scored or answered"""
    mean_tokens: int
    max_tokens: int
    new_tokens: int
    layer_tokens: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    def config(self) -> LlamaConfig:
        return LlamaConfig(**self.model, max_position_embeddings=2 * self.max_tokens)

    def examples(self) -> RandomExamples:
        return RandomExamples(self.model["vocab_size"], self.mean_tokens, self.max_tokens - 64)

    def protocol(self) -> Protocol:
        return Protocol(
            steps=self.steps,
            warmup_steps=0,
            global_batch_size=self.batch,
            max_tokens=self.max_tokens,
            max_new_tokens=self.new_tokens,
            precision=str(self.dtype).removeprefix("torch."),
        )


WIDTHS = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
SEVEN_B = Setting(WIDTHS | {"num_hidden_layers": 32}, 6, 128, 160, 2048, 256, (512, 2048, 8192))
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 256, "num_hidden_layers": 2}
SMOKE = Setting(TINY, 2, 4, 12, 128, 8, (16,))


class Stages:
    """Seconds and, on a GPU, the peak of live tensors of every stage."""

    def __init__(self, device: torch.device) -> None:
        self.found: dict[str, dict[str, float | None]] = {}
        self._is_gpu = device.type == "cuda"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        if self._is_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        self._wait()
        peak = torch.cuda.max_memory_allocated() if self._is_gpu else None
        self.found[name] = {"seconds": time.perf_counter() - started, "peak_bytes": peak}

    def _wait(self) -> None:
        if self._is_gpu:
            torch.cuda.synchronize()


@dataclass
class Bench:
    """The model that all parts share, loaded when it is first wanted."""

    setting: Setting
    checkpoint: Path
    device: torch.device
    model: PreTrainedModel | None = None
    load: dict[str, Any] = field(default_factory=dict)
    """the stage"""

    def loaded(self) -> PreTrainedModel:
        if self.model is None:
            stages = Stages(self.device)
            with stages("load"):
                self.model = load_model(self.checkpoint, self.setting.dtype, self.device)
            self.load = stages.found["load"]
        return self.model

    def forget(self) -> None:
        """Load the model anew: a part that failed left it half-changed."""
        self.model = None
        gc.collect()

    def dense(self) -> DenseWeights:
        names = tuple(prunable_weights(self.loaded()))
        return DenseWeights(TensorFiles(weight_files(self.checkpoint)), names, self.setting.dtype, self.device)

    def rows(self) -> list[Encoded]:
        return self.setting.examples().pairs(2 * self.setting.batch, answer_tokens=2)

    @property
    def dims(self) -> ModelDims:
        return ModelDims.from_config(self.loaded().config)

    def budgets(self, mode: str) -> Budgets:
        if self.device.type != "cuda":
            return cpu_budgets(self.setting.max_tokens)
        card = torch.cuda.get_device_properties(self.device).total_memory
        return budgets_for(card, 1.0, CellMemory(self.dims, mode, METHOD, self.setting.protocol()))


def cell(mode: str, bench: Bench) -> dict[str, Any]:
    """A cell of a mode, as the pipeline runs it, but for the ledger: every stage, in order."""
    model, dense, stages = bench.loaded(), bench.dense(), Stages(bench.device)
    budgets, facts = bench.budgets(mode), MODES[mode]
    sparsity = SPARSITY if facts.is_pruned else 0.0
    with stages("restore"):
        dense.restore_into(model)
    with stages("prune"):
        masks = prune_into(model, METHOD, bench.dims, sparsity)
    with stages("train"):
        adapted, steps = _train(bench, masks if facts.masks_update else None, budgets)
    impls = dict(count_impls(adapted))
    with stages("merge"):
        merge = merge_adapters_into(adapted, MaskedWeights(dense, masks), masks if facts.masks_at_merge else None)
        adapted.unload()
        if facts.masks_at_merge:
            mask_weights_into(model, masks)
    _check_and_score(bench, masks, sparsity, merge.changed, stages)
    return {
        "implementations": impls,
        "budgets": budgets.as_record(),
        "train_tokens_per_second": _rate([(step.tokens, step.seconds) for step in steps]),
        "train_loss": steps[-1].loss,
        "rounded_away_fraction": merge.sums.rounded_away_fraction,
        "stages": {"load": bench.load} | stages.found,
        "forecast_bytes": CellMemory(bench.dims, mode, METHOD, bench.setting.protocol()).stages(budgets),
    }


def _train(bench: Bench, update_masks: BitMasks | None, budgets: Budgets) -> tuple[PeftModel, list[Step]]:
    protocol = bench.setting.protocol()
    adapted = adapt_model(bench.loaded(), protocol, update_masks, seed=0)
    optimizer = adamw([parameter for parameter in adapted.parameters() if parameter.requires_grad], protocol)
    if budgets.keeps_effective_weights:
        keep_for_steps(adapted, optimizer)
    return adapted, list(fit(adapted.get_base_model(), optimizer, bench.rows(), protocol, 0, budgets=budgets))


def _check_and_score(bench: Bench, masks: BitMasks, sparsity: float, changed: list[str], stages: Stages) -> None:
    model, choices = bench.loaded(), bench.setting.examples().questions(bench.setting.batch, 2, choice_tokens=1)
    with stages("validate"):
        report = validation_report(prunable_weights(model), masks, sparsity, masks.sha256)
    violations = [*report["violations"], *changed]
    assert not violations, violations
    with hashing(prunable_weights(model)) as checksum:
        with stages("score"):
            log_likelihoods(model, choices, bench.budgets(DENSE).scoring_tokens)
        with stages("wait for the checksum"):
            checksum()


def _rate(steps: Sequence[tuple[int, float]]) -> float:
    """Tokens a second, of (tokens, seconds) of each step but the first, which chooses kernels."""
    tokens, seconds = (sum(column) for column in zip(*steps[1:], strict=True))
    return tokens / seconds


def stock_peft(bench: Bench) -> dict[str, Any]:
    """Plain LoRA in stock PEFT on the dense model: the same steps, by transformers' own loss."""
    model, protocol, stages = bench.loaded(), bench.setting.protocol(), Stages(bench.device)
    budgets = bench.budgets(DENSE)
    bench.dense().restore_into(model)
    with stages("train"), in_training(model, budgets.activation_checkpointing):
        adapted = peft_model(model, PeftLinear, fp32_adapters=True)
        optimizer = adamw([parameter for parameter in adapted.parameters() if parameter.requires_grad], protocol)
        steps = []
        for batch in islice(batches(bench.rows(), protocol, 0), protocol.steps):
            started = time.perf_counter()
            loss = _stock_step(adapted, optimizer, batch, budgets.micro_batch_tokens)
            steps.append((sum(map(example_tokens, batch)), time.perf_counter() - started))
    kinds = {type(module) for module in adapted.modules() if isinstance(module, PeftLinear)}
    assert kinds == {PeftLinear}, f"stock PEFT must compute with its own layers, got {kinds}"
    adapted.unload()
    return {"train_tokens_per_second": _rate(steps), "train_loss": loss, "stages": stages.found}


def _stock_step(adapted: Any, optimizer: Optimizer, examples: Sequence[Encoded], tokens: int) -> float:
    parts = micro_batches(examples, tokens)
    targets = sum(len(part.targets) for part in parts)
    losses = []
    for part in parts:
        loss = _stock_loss(adapted, part) / targets
        loss.backward()
        losses.append(loss.detach())
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(torch.stack(losses).sum())


def _stock_loss(adapted: Any, batch: Batch) -> Tensor:
    """Summed over the targets."""
    labels = torch.full_like(batch.ids, -100).flatten()
    labels[batch.places + 1] = batch.targets
    ids, labels = batch.ids.to(adapted.device), labels.view(batch.ids.shape).to(adapted.device)
    return adapted(input_ids=ids, labels=labels, use_cache=False).loss * len(batch.targets)


class NoTokenizer:
    """Answers go on to their last token, and nobody reads them."""

    eos_token_id = -1

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return ""


def generation(bench: Bench) -> dict[str, Any]:
    """Answers of the largest length, in batches of the budget."""
    model, new = bench.loaded(), bench.setting.new_tokens
    prompts = bench.setting.examples().texts(2 * bench.setting.batch)
    chosen = batches_by_length([len(prompt) + new for prompt in prompts], bench.budgets(DENSE).generation_tokens)
    stages: Any = Stages(bench.device)
    with stages("all"):
        for batch in chosen:
            generate(model, NoTokenizer(), [prompts[i] for i in batch], new, until=())
    answers, seconds = len(prompts), stages.found["all"]["seconds"]
    rates = {"answers_per_second": answers / seconds, "tokens_per_second": answers * new / seconds}
    return {"answers": answers, "new_tokens": new, "batches": len(chosen)} | rates | stages.found["all"]


def scoring(choices: int, choice_tokens: int, bench: Bench) -> dict[str, Any]:
    """Likelihoods of choices after a shared context."""
    questions = bench.setting.examples().questions(4 * bench.setting.batch, choices, choice_tokens)
    tokens, stages = sum(map(question_tokens, questions)), Stages(bench.device)
    model, budget = bench.loaded(), bench.budgets(DENSE).scoring_tokens
    log_likelihoods(model, questions[: bench.setting.batch], budget)
    with stages("all"):
        log_likelihoods(model, questions, budget)
    seconds = stages.found["all"]["seconds"]
    assert seconds is not None
    return {"questions": len(questions), "tokens_per_second": tokens / seconds} | stages.found["all"]


def layers(tokens: int, bench: Bench) -> dict[str, Any]:
    """Forward and backward of one layer: ours, SparsePEFT's, LoRA's, and the product alone, in seconds."""
    width = bench.setting.model["hidden_size"]
    return layer_row(width, bench.setting.dtype, tokens, "effective-weight", 0.5, 5, bench.device)


Measure = Callable[[Bench], dict[str, Any]]


def parts(setting: Setting) -> dict[str, dict[str, tuple[Measure, float]]]:
    """{part: {name: (what is measured, seconds that it should take on an H100 at most)}}"""
    cells: dict[str, tuple[Measure, float]] = {mode: (partial(cell, mode), 90) for mode in reversed(ADAPTER_MODES)}
    return {
        "cells": cells | {"stock PEFT": (stock_peft, 45)},
        "layers": {f"{tokens} tokens": (partial(layers, tokens), 10) for tokens in setting.layer_tokens},
        "generation": {"answers": (generation, 45)},
        "scoring": {"yes or no": (partial(scoring, 2, 1), 30), "four endings": (partial(scoring, 4, 25), 30)},
    }
