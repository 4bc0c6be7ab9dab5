from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.models.architectures import ARCHITECTURES, read_weights
from tune_sparse.models.checkpoints import load_model, load_tokenizer
from tune_sparse.pruning.calibration import (
    InputStats,
    ModelBlocks,
    calibrate_blockwise,
    checked_examples,
    example_loss,
    gradient_sums,
    text_examples,
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


def test_text_is_cut_into_examples(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    text = "one two three four five six seven eight nine ten. " * 40
    ids = tokenizer(text)["input_ids"]
    examples = text_examples(tokenizer, text, examples=3, tokens=7)
    assert [example.continuation for example in examples] == [tuple(ids[i : i + 7]) for i in (0, 7, 14)]
    with pytest.raises(InputError, match=r"must have examples x tokens = 300 x 700 tokens, got \d+\. Give more text"):
        text_examples(tokenizer, text, examples=300, tokens=700)


def test_too_few_or_too_short_examples_are_refused() -> None:
    assert checked_examples(EXAMPLES, 2) == EXAMPLES[:2]
    with pytest.raises(InputError, match="calibration needs 6 examples, got 5"):
        checked_examples(EXAMPLES, 6)
    with pytest.raises(InputError, match="must have at least 2 tokens, example 2 has fewer"):
        checked_examples([EXAMPLES[0], Encoded((), (1,))], 2)
