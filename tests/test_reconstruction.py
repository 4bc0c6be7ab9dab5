from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.models.architectures import ARCHITECTURES, read_weights
from tune_sparse.models.checkpoints import load_model
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.calibration import ModelBlocks
from tune_sparse.pruning.prune_into import prune_into
from tune_sparse.pruning.reconstruction import DAMPING, BlockRecovery, damp_into, reconstruct_into, solve

RNG = random.Random(0)
EXAMPLES = [Encoded((), tuple(RNG.randrange(700) for _ in range(24))) for _ in range(8)]


def problem(rows: int, width: int, kept: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(start, dense, mask, inputs (tokens, I)) with correlated inputs; the start is another weight."""
    generator = torch.Generator().manual_seed(seed)
    start, dense = torch.randn(2, rows, width, generator=generator)
    mask = torch.rand(rows, width, generator=generator) < kept
    strong = torch.randn(3 * width, 2, generator=generator) @ torch.randn(2, width, generator=generator)
    return start, dense, mask, torch.randn(3 * width, width, generator=generator) + strong


def objective(weight: Tensor, dense: Tensor, x: Tensor) -> float:
    """‖(W - dense) X‖² + λ ‖W - dense‖², by its definition."""
    weight, dense, x = weight.double(), dense.double(), x.double()
    damping = DAMPING * (x.T @ x).diagonal().mean()
    return float(((weight - dense) @ x.T).square().sum() + damping * (weight - dense).square().sum())


def test_each_row_is_the_least_squares_solution_on_its_survivors() -> None:
    start, dense, mask, x = problem(rows=5, width=24, kept=0.5)
    found = solve(start, dense, mask, damp_into(x.T @ x), iterations=60)
    damping = np.sqrt(float(DAMPING * (x.T @ x).diagonal().mean()))
    for row, keep, wanted in zip(found.numpy(), mask.numpy(), dense.numpy(), strict=True):
        # Rows of the damped problem: every token, and a pull of each survivor towards its dense value.
        left = np.concatenate([x.numpy()[:, keep], damping * np.eye(24)[:, keep]])
        right = np.concatenate([x.numpy() @ wanted, damping * wanted])
        expected = np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(row[keep], expected, atol=1e-4)
        assert not row[~keep].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 32), st.floats(0, 1), st.integers(0, 9), st.integers(1, 20))
def test_zeros_stay_and_the_objective_never_rises(rows: int, width: int, kept: float, seed: int, steps: int) -> None:
    start, dense, mask, x = problem(rows, width, kept, seed)
    gram = damp_into(x.T @ x)
    losses = [objective(solve(start, dense, mask, gram, n), dense, x) for n in (0, steps, steps + 1)]
    assert losses[1] <= losses[0] * (1 + 1e-5) + 1e-4
    assert losses[2] <= losses[1] * (1 + 1e-5) + 1e-4
    found = solve(start, dense, mask, gram, steps)
    assert not found[~mask].any()
    assert not found[~mask].signbit().any(), "zeros without a sign"


def test_without_zeros_it_is_the_dense_weight() -> None:
    start, dense, _, x = problem(rows=4, width=16, kept=1)
    everything = torch.ones(4, 16, dtype=torch.bool)
    assert torch.equal(solve(dense, dense, everything, damp_into(x.T @ x)), dense)
    torch.testing.assert_close(solve(start, dense, everything, damp_into(x.T @ x), 60), dense, atol=1e-4, rtol=1e-4)


def test_inputs_that_are_never_used_do_no_harm() -> None:
    start, dense, mask, x = problem(rows=4, width=16, kept=0.5)
    x[:, 3] = 0
    assert solve(start, dense, mask, damp_into(x.T @ x)).isfinite().all()
    assert torch.equal(solve(start, dense, mask, torch.zeros(16, 16)), start * mask + 0.0)


def load(folder: Path) -> PreTrainedModel:
    return load_model(folder, torch.float32, torch.device("cpu"))


def recovered(model: PreTrainedModel, method: str = "unstructured") -> tuple[list[BlockRecovery], BitMasks]:
    dense = {name: weight.clone() for name, weight in read_weights(model).items()}
    masks = prune_into(model, method, ModelDims.from_config(model.config), 0.5)
    return list(reconstruct_into(ModelBlocks(model), dense, masks, EXAMPLES)), masks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_each_architecture_come_closer_to_the_dense_ones(
    name: str, architecture_folders: dict[str, Path]
) -> None:
    model = load(architecture_folders[name])
    dense = {matrix: weight.clone() for matrix, weight in read_weights(model).items()}
    found, masks = recovered(model)
    assert [block.block for block in found] == list(range(ModelBlocks(model).count))
    assert any(block.is_accepted for block in found)
    for block in found:
        assert block.is_accepted == block.after.is_within(block.before)
    for matrix in ModelBlocks(model).matrices:
        weight, mask = read_weights(model)[matrix.name], masks[matrix.name]
        assert not weight[~mask].any()
        if not found[matrix.block].is_accepted:
            assert torch.equal(weight[mask], dense[matrix.name][mask])


def test_a_block_that_would_be_further_away_keeps_its_pruned_weights(
    architecture_folders: dict[str, Path],
) -> None:
    model = load(architecture_folders["LlamaForCausalLM"])
    dense = {name: weight.clone() for name, weight in read_weights(model).items()}
    masks = prune_into(model, "unstructured", ModelDims.from_config(model.config), 0.5)
    pruned = {name: weight.clone() for name, weight in read_weights(model).items()}
    # One token, again and again, says nothing of the others.
    told = [Encoded((), (5,) * 24) if number % 4 != 3 else example for number, example in enumerate(EXAMPLES)]
    found = list(reconstruct_into(ModelBlocks(model), dense, masks, told))
    refused = [block.block for block in found if not block.is_accepted]
    assert refused
    for matrix in ModelBlocks(model).matrices:
        same = torch.equal(read_weights(model)[matrix.name], pruned[matrix.name])
        assert same == (matrix.block in refused), matrix.name


def test_few_examples_are_refused(llama: Path) -> None:
    model = load(llama)
    with pytest.raises(InputError, match=r"recovery needs 4 calibration windows, .* got 3\. Give more text, raise"):
        next(reconstruct_into(ModelBlocks(model), read_weights(model), {}, EXAMPLES[:3]))
