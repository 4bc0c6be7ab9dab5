"""Checkpoints of random weights, to be trained from scratch: drawn once, kept in the cache, then like any other.

A reference is a name of `FROM_SCRATCH`, or `random:FOLDER` for a folder with config and tokenizer, whose weights, if it
has some, are left alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.errors import InputError
from tune_sparse.files import atomic_folder, cache_dir

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

PREFIX = "random:"
END_OF_TEXT = "<|endoftext|>"
BYTES = 256
SEED = 0
"""Of the draw: a model is the same for every cell, as a pretrained one is."""
GPT2: dict[str, Any] = {"n_positions": 64, "n_embd": 128, "n_layer": 4, "n_head": 4}
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "shakespeare-gpt2": GPT2,
    "shakespeare-gpt2-124m": {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
}
"""{name: sizes of a GPT-2 that reads bytes}. The first is nanoGPT's for a CPU, the second GPT-2's own."""
COPIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def is_from_scratch(reference: str) -> bool:
    return reference in FROM_SCRATCH or reference.startswith(PREFIX)


def source_folder(reference: str) -> Path | None:
    """The folder that `random:FOLDER` names; None for a name of the table, or another reference."""
    return Path(reference.removeprefix(PREFIX)).expanduser() if reference.startswith(PREFIX) else None


def from_scratch_folder(reference: str) -> Path:
    """The folder of the checkpoint, whether it was drawn yet or not: its name follows from config, tokenizer and seed.

    Raises `InputError` for a folder without a config.
    """
    folder = source_folder(reference)
    if folder is None:
        decided, name = json.dumps([FROM_SCRATCH[reference], BYTES, SEED]).encode(), reference
    else:
        if not (folder / "config.json").is_file():
            raise InputError(
                f"random weights need a folder with config.json and a tokenizer, {folder} has no config.json. Fix it."
            )
        files = [folder / "config.json", *(folder / name for name in COPIED if (folder / name).is_file())]
        decided, name = b"".join(path.read_bytes() for path in files) + bytes([SEED]), f"{folder.resolve().name}-random"
    return cache_dir() / "models" / f"{name}-{hashlib.sha256(decided).hexdigest()[:8]}"


def draw_from_scratch(reference: str, report: Callable[[str], None]) -> Path:
    """The folder of the checkpoint, its weights drawn first where it is missing, as transformers initialises its class.

    Raises as `from_scratch_folder`.
    """
    folder = from_scratch_folder(reference)
    if not folder.is_dir():
        try:
            with atomic_folder(folder) as partial:
                _draw_into(partial, reference)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
        report(f"{reference}: random weights, saved in {folder}")
    return folder


def _draw_into(folder: Path, reference: str) -> None:
    import torch
    from safetensors.torch import save
    from transformers import AutoConfig, AutoModelForCausalLM

    source = source_folder(reference)
    config = AutoConfig.from_pretrained(source) if source else byte_gpt2(**FROM_SCRATCH[reference])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    config.save_pretrained(folder)
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    if source is None:
        byte_tokenizer(config.max_position_embeddings).save_pretrained(folder)
    else:
        for name in (name for name in COPIED if (source / name).is_file()):
            shutil.copyfile(source / name, folder / name)


def byte_gpt2(**sizes: int) -> PretrainedConfig:
    """A GPT-2 that reads bytes, without dropout."""
    from transformers import GPT2Config

    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), BYTES)
    return GPT2Config(**sizes, **ids, vocab_size=BYTES + 1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def byte_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """A token for each byte, and one that ends a text and pads: so many tokens as UTF-8 has bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: number for number, byte in enumerate(alphabet)} | {END_OF_TEXT: BYTES}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
