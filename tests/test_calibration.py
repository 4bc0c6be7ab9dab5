from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.models.architectures import ARCHITECTURES, read_weights
from tune_sparse.models.checkpoints import load_model, load_tokenizer
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.calibration import (
    InputStats,
    ModelBlocks,
    calibrate_blockwise,
    calibration_line,
    count_tokens,
    example_loss,
    example_windows,
    gradient_sums,
    text_windows,
    tokens_per_input,
    windows,
)
from tune_sparse.pruning.streaming import StreamedBlocks, open_checkpoint

RNG = random.Random(0)
EXAMPLES = [Encoded((), tuple(RNG.randrange(700) for _ in range(20))) for _ in range(5)]


def load_module(folder: Path) -> nn.Module:
    return load_model(folder, torch.float32, torch.device("cpu"))


def test_sums_by_hand() -> None:
    inputs = InputStats(wants_hessian=True)
    inputs.add(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    inputs.add(torch.tensor([[[4.0, 0.0]]]))
    assert inputs.norms.tolist() == [5.0, 1.0]
    torch.testing.assert_close(inputs.take_hessian(), torch.tensor([[25.0, 0.0], [0.0, 1.0]]) * 2 / 3)
    assert inputs.dead.tolist() == [False, False]
    assert inputs.products is None, "a Hessian lives as long as the caller wants it"


def test_an_input_that_is_always_zero_is_dead() -> None:
    inputs = InputStats(wants_hessian=False)
    inputs.add(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert inputs.dead.tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_inputs_are_what_each_layer_reads_in_one_forward_pass(name: str, architecture_folders: dict[str, Path]) -> None:
    model = load_module(architecture_folders[name])
    blocks = ModelBlocks(model)
    seen: dict[str, list[Tensor]] = {}
    layers = {matrix.name: model.get_submodule(matrix.name.removesuffix(".weight")) for matrix in blocks.matrices}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for example in EXAMPLES:
            model(torch.tensor([example.continuation]), use_cache=False)
    for hook in hooks:
        hook.remove()
    inputs = {
        source: sums
        for _, found in calibrate_blockwise(blocks, EXAMPLES, wants_hessians=True)
        for source, sums in found.items()
    }
    hessians = {source: sums.take_hessian() for source, sums in inputs.items()}
    for matrix in blocks.matrices:
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen[matrix.name]])
        torch.testing.assert_close(inputs[matrix.input_key].norms, x.norm(dim=0))
        torch.testing.assert_close(hessians[matrix.input_key], 2 * x.T @ x / len(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_read_block_by_block_computes_the_same(name: str, architecture_folders: dict[str, Path]) -> None:
    folder = architecture_folders[name]
    whole = calibrate_blockwise(ModelBlocks(load_module(folder)), EXAMPLES, wants_hessians=True)
    streamed = calibrate_blockwise(
        StreamedBlocks(open_checkpoint(str(folder)), torch.float32), EXAMPLES, wants_hessians=True
    )
    for (_, expected), (_, found) in zip(whole, streamed, strict=True):
        assert list(found) == list(expected)
        for source, sums in expected.items():
            assert found[source].tokens == sums.tokens
            torch.testing.assert_close(found[source].norms, sums.norms)
            torch.testing.assert_close(found[source].take_hessian(), sums.take_hessian())


def test_experts_read_the_tokens_that_are_sent_to_them(architecture_folders: dict[str, Path]) -> None:
    model = load_module(architecture_folders["MixtralForCausalLM"])
    inputs = {
        source: sums for _, found in calibrate_blockwise(ModelBlocks(model), EXAMPLES) for source, sums in found.items()
    }
    tokens = sum(len(example.continuation) for example in EXAMPLES)
    for block in range(2):
        sent = [inputs[block, expert, "feed-forward"].tokens for expert in range(4)]
        assert sum(sent) == 2 * tokens
        assert sent == [inputs[block, expert, "channels"].tokens for expert in range(4)]


def test_an_expert_without_a_token_is_refused(architecture_folders: dict[str, Path]) -> None:
    model = load_module(architecture_folders["MixtralForCausalLM"])
    with pytest.raises(
        InputError, match=r"experts\.\d\.w1\.weight was given no token by 1 examples\. Give more examples"
    ):
        list(calibrate_blockwise(ModelBlocks(model), [Encoded((), (5,))]))


def test_activations_that_overflow_are_refused(architecture_folders: dict[str, Path]) -> None:
    model = load_module(architecture_folders["LlamaForCausalLM"])
    read_weights(model)["model.layers.0.mlp.up_proj.weight"].fill_(1e38)
    with pytest.raises(InputError, match=r"activations must be finite, the input of model\.layers\.0\.mlp\.down_proj"):
        list(calibrate_blockwise(ModelBlocks(model), EXAMPLES))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_summed_example_by_example(name: str, architecture_folders: dict[str, Path]) -> None:
    folder = architecture_folders[name]
    model, blocks = load_module(folder), ModelBlocks(load_module(folder))
    found = gradient_sums(blocks.whole(), EXAMPLES, blocks.matrices)
    assert not any(p.requires_grad or p.grad is not None for p in blocks.whole().parameters())
    model.requires_grad_(True)
    expected = {name: torch.zeros_like(weight) for name, weight in read_weights(model).items()}
    for example in EXAMPLES:
        model.zero_grad()
        example_loss(model, example).backward()
        for parameter in model.parameters():
            parameter.data, parameter.grad = parameter.grad, None  # so that read_weights shows the gradients
        for matrix, gradient in read_weights(model).items():
            expected[matrix] += gradient.abs()
        model.load_state_dict(blocks.whole().state_dict())
    for matrix, total in expected.items():
        torch.testing.assert_close(found[matrix], total, atol=1e-6, rtol=1e-5)


def test_the_loss_is_that_of_transformers(architecture_folders: dict[str, Path]) -> None:
    model = load_module(architecture_folders["LlamaForCausalLM"])
    ids = torch.tensor([EXAMPLES[0].continuation])
    torch.testing.assert_close(example_loss(model, EXAMPLES[0]), model(ids, labels=ids).loss)
    answered = Encoded(EXAMPLES[0].continuation[:15], EXAMPLES[0].continuation[15:])
    labels = ids.clone()
    labels[:, :15] = -100
    torch.testing.assert_close(example_loss(model, answered), model(ids, labels=labels).loss)


def test_a_text_is_cut_into_windows(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    text = "one two three four five six seven eight nine ten. " * 40
    ids = tokenizer(text)["input_ids"]
    found = text_windows(tokenizer, text, tokens=21, window=7)
    assert [example.continuation for example in found] == [tuple(ids[i : i + 7]) for i in (0, 7, 14)]
    assert count_tokens(text_windows(tokenizer, text, tokens=10**6, window=700)) == len(ids), "all there are"


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=9), st.integers(2, 40), st.integers(2, 12))
def test_windows_hold_the_first_tokens_in_order(texts: list[list[int]], tokens: int, window: int) -> None:
    wanted = [token for text in texts for token in text][:tokens]
    if len(wanted) < 2:
        with pytest.raises(InputError, match=rf"calibration needs at least 2 tokens, got {len(wanted)}"):
            windows(texts, tokens, window)
        return
    found = windows(texts, tokens, window)
    ids = [token for example in found for token in example.continuation]
    assert ids == wanted[: len(ids)]
    assert len(wanted) - len(ids) == (len(wanted) % window == 1), "nothing follows a token alone"
    assert all(len(example.continuation) == window for example in found[:-1])


def test_examples_are_joined_from_all_of_the_training_split() -> None:
    """A mixture has the examples of one task behind those of the other."""
    examples = [Encoded((task, number), (7,)) for task in (0, 1) for number in range(50)]
    found = example_windows(examples, tokens=60, window=30)
    assert [len(window.continuation) for window in found] == [30, 30]
    assert {window.continuation[i] for window in found for i in (0, 3, 6, 9)} == {0, 1}


def test_tokens_for_each_input_of_the_widest_layer(architecture_folders: dict[str, Path]) -> None:
    llama, mixtral = (
        ModelDims.from_config(load_module(architecture_folders[name]).config)
        for name in ("LlamaForCausalLM", "MixtralForCausalLM")
    )
    assert tokens_per_input(llama, 1000) == 1000 / llama.intermediate_size
    assert tokens_per_input(mixtral, 1000) == 1000 * 2 / 4 / mixtral.hidden_size
    few, enough = (round(tokens * llama.intermediate_size) for tokens in (1.9, 2))
    assert "a warning" in calibration_line("sparsegpt", llama, few)
    assert "a warning" not in calibration_line("sparsegpt", llama, enough) + calibration_line("wanda", llama, few)
