"""Better scores lose less, on trained toy models and on real text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tune_sparse.config import Protocol
from tune_sparse.data.splits import Encoded, encode_answers, load_splits
from tune_sparse.data.tasks import TASKS
from tune_sparse.models.checkpoints import check_checkpoint, load_model, load_tokenizer, write_weights_into
from tune_sparse.models.toy_models import toy_model
from tune_sparse.pruning.calibration import (
    CalibrationStats,
    ModelBlocks,
    calibrate_blockwise,
    example_loss,
    text_windows,
)
from tune_sparse.pruning.prune_model import Prunable, prune, prune_blockwise

METHODS = ("unstructured", "wanda", "sparsegpt")


class Calibrated:
    """A toy model with its inputs on some examples, and pruned by each method to 50%."""

    def __init__(self, folder: Path, examples: list[Encoded]) -> None:
        self.model = load_model(folder, torch.float32, torch.device("cpu"))
        self.blocks = ModelBlocks(self.model)
        self.dense = {name: weight.clone() for b in range(3) for name, weight in self.blocks.weights(b).items()}
        self.prunable = Prunable.from_weights(self.dense, check_checkpoint(str(folder)).dims)
        self.inputs = {
            source: sums
            for _, found in calibrate_blockwise(self.blocks, examples, True)
            for source, sums in found.items()
        }
        statistics = CalibrationStats(norms={source: sums.norms for source, sums in self.inputs.items()})
        found = {method: prune(method, self.prunable, [0.5], 0, statistics) for method in METHODS[:2]}
        found["sparsegpt"] = prune_blockwise("sparsegpt", self.prunable, self.blocks, examples, [0.5])
        self.pruned = {method: {m.name: m.weight(0) for m in matrices} for method, matrices in found.items()}

    def errors(self, method: str) -> dict[str, float]:
        """|Wx - W'x|² / |Wx|² of each matrix over the examples."""
        found = {}
        for matrix in self.prunable.matrices:
            hessian, dense = self.inputs[matrix.input_key].products, self.dense[matrix.name]
            assert hessian is not None
            lost = self.pruned[method][matrix.name] - dense
            found[matrix.name] = float(((lost @ hessian) * lost).sum() / ((dense @ hessian) * dense).sum())
        return found

    @torch.no_grad()
    def perplexity(self, method: str | None, examples: list[Encoded]) -> float:
        write_weights_into(self.model, self.pruned[method] if method else self.dense)
        return math.exp(sum(example_loss(self.model, example).item() for example in examples) / len(examples))


def calibrated_on_boolq(folder: Path) -> Calibrated:
    examples = load_splits(TASKS["boolq"], None, Protocol(n_train=64)).train
    pairs = [TASKS["boolq"].training_pair(example) for example in examples]
    return Calibrated(folder, encode_answers(load_tokenizer(folder), pairs, 256))


def assert_ordered(calibrated: Calibrated) -> None:
    magnitude, wanda, sparsegpt = (calibrated.errors(method) for method in METHODS)
    mean = [sum(errors.values()) / len(errors) for errors in (sparsegpt, wanda, magnitude)]
    print("mean reconstruction error, SparseGPT, Wanda, magnitude:", mean)
    assert mean == sorted(mean)
    assert all(sparsegpt[name] < min(wanda[name], magnitude[name]) for name in sparsegpt)


def test_sparsegpt_reconstructs_best_then_wanda_then_magnitude(own_cache: Path) -> None:
    assert_ordered(calibrated_on_boolq(toy_model("tiny-llama", steps=60)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral"])
def test_the_order_holds_on_fully_trained_models_and_real_text(name: str, own_cache: Path, real_examples: Path) -> None:
    """Perplexities are printed beside the errors. The models never saw English text: they are far from good at it."""
    folder = toy_model(name)
    assert_ordered(calibrated_on_boolq(folder))
    tokenizer = load_tokenizer(folder)
    for text in ("wikitext2/train.txt", "tinyshakespeare/input.txt"):
        examples = text_windows(
            tokenizer, (real_examples / text).read_text(encoding="utf-8"), tokens=96 * 128, window=128
        )
        calibrated = Calibrated(folder, examples[:64])
        assert_ordered(calibrated)
        found = {
            method or "dense": round(calibrated.perplexity(method, examples[64:]), 1) for method in (None, *METHODS)
        }
        print(f"{name}, perplexity on {text}: {found}")
        assert all(math.isfinite(value) for value in found.values())
