"""Tiny language models of real classes, trained from scratch on the synthetic tasks and kept in the cache.

The base training stops part-way: the models read and answer, but tuning still has something to add, and a pruned
copy has something to win back.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from tune_sparse.data.batching import as_batch
from tune_sparse.data.splits import Encoded, encode_answers
from tune_sparse.data.synthetic import GENERATOR_VERSION, SYNTHETIC_TASKS, open_questions, synthetic_examples
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import unknown_name
from tune_sparse.files import atomic_folder, cache_dir
from tune_sparse.models.from_scratch import END_OF_TEXT
from tune_sparse.training.loop import answer_loss, cosine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "opt": (OPTConfig, OPTForCausalLM),
}
MAX_TOKENS = 2048
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": MAX_TOKENS,
    "tie_word_embeddings": False,
    # The default of 0.02 is made for wide layers: at width 64, yes-or-no questions stay at 0.8 with it.
    "initializer_range": 0.08,
}
POSITIONS = 512
"""Where they are learned, all must have been seen."""
GPT2_SHAPE: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 8,
    "n_inner": 256,
    "n_positions": POSITIONS,
    "initializer_range": 0.08,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
OPT_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "ffn_dim": 256,
    "max_position_embeddings": POSITIONS,
    "init_std": 0.08,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of a model; its hash is part of the folder's name."""

    kind: str
    """A key of `CLASSES`."""
    config: dict[str, Any]
    """Arguments of the configuration class, without the tokens."""
    vocabulary: int = 768
    """Entries of the tokenizer at most."""
    steps: int = 800
    warmup_steps: int = 50
    learning_rate: float = 3e-3
    """Peak; a cosine takes it to 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    batch: dict[str, int] = field(default_factory=lambda: {"boolq": 60, "hellaswag": 16, "gsm8k": 20})
    """Examples of each task in one step."""
    open_fraction: float = 0.3
    """Share of the boolq examples that ask for the attribute itself: without them yes and no are learned late."""
    seed: int = 0
    generator_version: int = GENERATOR_VERSION

    @property
    def hash8(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def learning_rate_at(self, step: int) -> float:
        """A cosine to 0, its first steps times a linear warm-up. `step` counts from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return cosine(math.pi * step / self.steps, self.learning_rate * warm)


RECIPES = {
    "tiny-llama": Recipe("llama", SHAPE),
    "tiny-mistral": Recipe("mistral", SHAPE | {"sliding_window": 32}),
    "tiny-gpt2": Recipe("gpt2", GPT2_SHAPE),
    "tiny-opt": Recipe("opt", OPT_SHAPE),
}
TOY_MODELS: tuple[str, ...] = tuple(RECIPES)

Report = Callable[[str], None]


def toy_model(name: str, report: Report | None = None, *, steps: int | None = None) -> Path:
    """Folder of the Hugging Face checkpoint; trained first where it is missing (about a minute on one core).

    `steps` shortens the training, into a folder of its own.
    """
    recipe = _recipe(name, steps)
    folder = toy_model_folder(name, steps)
    if not folder.is_dir():
        say = report or (lambda line: None)
        start = time.perf_counter()
        say(f"{name}: training from scratch, {recipe.steps} steps")
        model, tokenizer = _trained(recipe, lambda line: say(f"{name}: {line}"))
        _save(model, tokenizer, folder)
        say(f"{name}: trained in {time.perf_counter() - start:.0f} s, saved in {folder}")
    return folder


def train_toy_models(names: Iterable[str], report: Report | None = None, *, steps: int | None = None) -> list[Path]:
    """Folders of several models; the missing ones are trained side by side, a process with one thread each."""
    names = list(names)
    folders = {name: toy_model_folder(name, steps) for name in names}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if len(missing) == 1:
        toy_model(missing[0], report, steps=steps)
    elif missing:
        _train_side_by_side(missing, report or (lambda line: None), steps)
    return [folders[name] for name in names]


def _train_side_by_side(names: Sequence[str], report: Report, steps: int | None) -> None:
    start = time.perf_counter()
    # Forking a process that has used torch threads can hang.
    with ProcessPoolExecutor(len(names), mp_context=get_context("spawn")) as pool:
        report(f"training from scratch, side by side: {', '.join(names)}")
        futures = {pool.submit(toy_model, name, steps=steps): name for name in names}
        for done in as_completed(futures):
            report(f"{futures[done]}: trained in {time.perf_counter() - start:.0f} s, saved in {done.result()}")


def _recipe(name: str, steps: int | None) -> Recipe:
    if name not in RECIPES:
        raise unknown_name("toy model", name, RECIPES)
    return RECIPES[name] if steps is None else replace(RECIPES[name], steps=steps)


def toy_model_folder(name: str, steps: int | None = None) -> Path:
    """The folder of a toy model's checkpoint, whether it is trained yet or not."""
    recipe = _recipe(name, steps)
    return cache_dir() / "models" / f"{name}-{recipe.hash8}"


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Written aside and renamed: the folder is whole or absent. Where another process was first, its model stays."""
    model.config.architectures = [type(model).__name__]
    try:
        with atomic_folder(folder) as partial:
            model.config.save_pretrained(partial)
            # model.save_pretrained draws a progress bar, and save_file hides the file from other users.
            tensors = {name: parameter.data for name, parameter in model.named_parameters()}  # a tied one once
            (partial / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
            tokenizer.save_pretrained(partial)
    except OSError:
        if not folder.is_dir():
            raise


def toy_tokenizer(vocabulary: int = 768) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the base texts. All 256 bytes are in it, so that it encodes any text, and no text starts
    with a token of its own; the end-of-text token also pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (context + rest for pairs in _base_pairs().values() for context, rest in pairs)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _base_pairs() -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) pairs of the base split by task, and the open questions."""
    pairs = {"open": open_questions()}
    for name in SYNTHETIC_TASKS:
        task = TASKS[name]
        assert isinstance(task, PromptTask)
        pairs[name] = [task.training_pair(example) for example in synthetic_examples(name, "base")]
    return pairs


def _trained(recipe: Recipe, report: Report) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of `recipe` and its tokenizer. On one thread, so that sums have one order and the weights repeat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(recipe.seed)
            return _train(recipe, report)
    finally:
        torch.set_num_threads(threads)


def _train(recipe: Recipe, report: Report) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = toy_tokenizer(recipe.vocabulary)
    pools = {name: encode_answers(tokenizer, pairs, MAX_TOKENS) for name, pairs in _base_pairs().items()}
    model = _untrained(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    rng = random.Random(recipe.seed)
    model.train()
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(step)
        loss = 0.0
        for examples in _step_examples(recipe, pools, rng):
            batch = as_batch([(example,) for example in examples])
            summed = answer_loss(model, batch)
            (summed / len(batch.targets)).backward()
            loss += summed.item() / len(batch.targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            report(f"step {step + 1} of {recipe.steps}, loss {loss:.3f}")
    return model.eval(), tokenizer


def _untrained(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    make_config, make_model = CLASSES[recipe.kind]
    config = make_config(
        **recipe.config,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: PreTrainedModel = make_model(config)
    return model


def _step_examples(recipe: Recipe, pools: dict[str, list[Encoded]], rng: random.Random) -> list[list[Encoded]]:
    """Examples of one step, a list for each task: examples of one task have about one length, which saves padding."""
    counts = dict(recipe.batch)
    n_open = round(recipe.open_fraction * counts["boolq"])
    counts["boolq"] -= n_open
    examples = {name: rng.sample(pools[name], count) for name, count in counts.items()}
    examples["boolq"] += rng.sample(pools["open"], n_open)
    return list(examples.values())
