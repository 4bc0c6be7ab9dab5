"""A checkpoint of random weights and random examples, of any size: to measure where there is neither data nor network.

Needs torch, transformers and safetensors alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from tune_sparse.data.splits import Encoded
from tune_sparse.files import write_json
from tune_sparse.models.safetensors_io import INDEX, TensorWriter

STD = 0.02


def write_checkpoint(config: PretrainedConfig, folder: Path, dtype: torch.dtype, device: torch.device) -> int:
    """Write a model of this config into `folder`, a file for each block, one matrix in memory at a time: its bytes."""
    folder.mkdir(parents=True)
    config.architectures = [type(_on_meta(config)).__name__]
    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in _on_meta(config).state_dict().items()}
    files = defaultdict[str, list[str]](list)
    for name in shapes:
        files[f"model-{_block(name):03}.safetensors"].append(name)
    generator = torch.Generator(device).manual_seed(0)
    for file, names in files.items():
        with TensorWriter(folder / file, {name: (shapes[name], dtype) for name in names}) as writer:
            for name in names:
                writer.write(name, _random(shapes[name], dtype, generator))
            writer.done()
    write_json(folder / INDEX, {"weight_map": {name: file for file, names in files.items() for name in names}})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _on_meta(config: PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _block(name: str) -> int:
    """The number of a tensor's block, from 1, and 0 for what lies around the blocks."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] + 1 if numbers else 0


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A norm keeps what it is given; a matrix is normal, as transformers initialises it."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    made = torch.empty(shape, dtype=dtype, device=generator.device)
    return made.normal_(std=STD, generator=generator)


class RandomExamples:
    """Examples of random tokens, whose lengths vary as those of real prompts do."""

    def __init__(self, vocabulary: int, mean_tokens: int, longest: int) -> None:
        self._rng = random.Random(0)
        self._vocabulary, self._mean, self._longest = vocabulary, mean_tokens, longest

    def texts(self, count: int) -> list[tuple[int, ...]]:
        """Log-normal lengths: a fifth of all texts has more than 1.5 times the mean."""
        lengths = (round(self._mean * self._rng.lognormvariate(-0.125, 0.5)) for _ in range(count))
        return [self._tokens(min(max(length, 2), self._longest)) for length in lengths]

    def pairs(self, count: int, answer_tokens: int) -> list[Encoded]:
        return [Encoded(text, self._tokens(answer_tokens)) for text in self.texts(count)]

    def questions(self, count: int, choices: int, choice_tokens: int) -> list[list[Encoded]]:
        """Every choice after one context."""
        return [[Encoded(text, self._tokens(choice_tokens)) for _ in range(choices)] for text in self.texts(count)]

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(self._vocabulary) for _ in range(count))
