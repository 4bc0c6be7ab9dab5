from __future__ import annotations

import itertools
import math
import random
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tune_sparse.config import Protocol
from tune_sparse.data.batching import Batch, as_batch
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import RunError
from tune_sparse.lora.layer import adapt_model, sparse_lora_layers
from tune_sparse.models.checkpoints import load_model
from tune_sparse.models.toy_models import RECIPES
from tune_sparse.training.budgets import CPU_BUDGETS, Budgets
from tune_sparse.training.loop import (
    Step,
    _accumulate_gradients,
    accelerator_for,
    adamw,
    answer_loss,
    batches,
    cosine,
    fit,
    learning_rate_at,
    mean_loss,
    packed_mask,
)

PROTOCOL = Protocol(
    steps=6,
    warmup_steps=1,
    global_batch_size=8,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    lora_rank=4,
    lora_alpha=8.0,
    precision="float32",
)


SMALL = replace(CPU_BUDGETS, micro_batch_tokens=200, scoring_tokens=200)
"""Some examples of a batch at a time."""


def changed(**changes: object) -> Protocol:
    return Protocol(**(vars(PROTOCOL) | changes))  # type: ignore[arg-type]


def random_examples(count: int, seed: int = 0) -> list[Encoded]:
    """Contexts of 3 to 60 tokens (longer than Mistral's window) and answers of 1 to 5."""
    rng = random.Random(seed)
    tokens = [[rng.randrange(1, 500) for _ in range(rng.randint(3, 60) + 5)] for _ in range(count)]
    cuts = [len(ids) - rng.randint(1, 5) for ids in tokens]
    return [Encoded(tuple(ids[:cut]), tuple(ids[cut:])) for ids, cut in zip(tokens, cuts, strict=True)]


EXAMPLES = random_examples(12)


@pytest.fixture(params=["llama", "mistral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(request.getfixturevalue(request.param), torch.float32, torch.device("cpu"))


@pytest.fixture
def adapted(llama: Path) -> PeftModel:
    return adapted_model(llama)


def adapted_model(llama: Path) -> PeftModel:
    return adapt_model(load_model(llama, torch.float32, torch.device("cpu")), PROTOCOL, None, seed=0)


def trainable(adapted: PeftModel) -> list[nn.Parameter]:
    return [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def fitted(
    adapted: PeftModel, examples: list[Encoded], protocol: Protocol, seed: int = 0, budgets: Budgets = SMALL
) -> Generator[Step, None, None]:
    """The training of all adapters, in micro-batches of several examples."""
    optimizer = adamw(trainable(adapted), protocol)
    return fit(adapted.get_base_model(), optimizer, examples, protocol, seed, budgets=budgets)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.5), (1, 1.0), (2, 1.0), (3, 0.1 + 0.45 * (1 + math.cos(math.pi / 6))), (5, 0.55), (8, 0.1)]
)
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(step: int, rate: float) -> None:
    protocol = Protocol(steps=9, warmup_steps=2, learning_rate=1.0, final_learning_rate=0.1)
    assert learning_rate_at(step, protocol) == pytest.approx(rate)


@pytest.mark.parametrize(("step", "rate"), [(0, 5e-5), (5, 3e-4), (6, 3e-4), (199, 3e-5)])
def test_the_learning_rate_of_the_matrix(step: int, rate: float) -> None:
    assert learning_rate_at(step, Protocol()) == pytest.approx(rate)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    protocol = Protocol(steps=3, warmup_steps=0, learning_rate=1.0, final_learning_rate=0.0)
    assert [learning_rate_at(step, protocol) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])


def test_a_cosine_falls_from_start_to_end() -> None:
    assert [cosine(angle, 1.0, 0.2) for angle in (0.0, math.pi / 2, math.pi)] == pytest.approx([1.0, 0.6, 0.2])


def test_the_toy_models_have_their_schedule_to_the_last_bit() -> None:
    recipe = RECIPES["tiny-llama"]
    for step in range(recipe.steps):
        warm = min(1.0, (step + 1) / 50)
        assert recipe.learning_rate_at(step) == 3e-3 * warm * (1 + math.cos(math.pi * step / 800)) / 2


def test_a_training_of_one_step_has_the_peak_rate() -> None:
    assert learning_rate_at(0, Protocol(steps=1, warmup_steps=0)) == Protocol().learning_rate


def first_examples(count: int, protocol: Protocol, seed: int = 0) -> list[Encoded]:
    return list(itertools.islice(itertools.chain.from_iterable(batches(EXAMPLES, protocol, seed)), count))


@pytest.mark.parametrize("global_batch_size", [4, 8, 12, 40])
def test_every_epoch_is_a_new_permutation_of_the_examples(global_batch_size: int) -> None:
    protocol = changed(global_batch_size=global_batch_size)
    assert {len(batch) for batch in itertools.islice(batches(EXAMPLES, protocol, 0), 9)} == {global_batch_size}
    seen = first_examples(5 * len(EXAMPLES), protocol)
    epochs = [tuple(seen[start : start + len(EXAMPLES)]) for start in range(0, len(seen), len(EXAMPLES))]
    assert all(set(epoch) == set(EXAMPLES) for epoch in epochs)
    assert len(set(epochs)) == 5


def test_the_order_of_examples_depends_on_the_seed_and_not_on_batches() -> None:
    expected = first_examples(48, PROTOCOL)
    assert first_examples(48, changed(global_batch_size=16)) == expected
    assert first_examples(48, PROTOCOL, seed=1) != expected


def whole(examples: Sequence[Encoded], train_on_prompt: bool = False) -> Batch:
    return as_batch([(example,) for example in examples], train_on_prompt)


def stock_loss(model: PreTrainedModel, example: Encoded, first_target: int) -> Tensor:
    """Summed by transformers itself, from its mean over the labels that are not -100."""
    ids = torch.tensor([example.context + example.continuation])
    labels = ids.clone()
    labels[:, :first_target] = -100
    return model(input_ids=ids, labels=labels).loss * (ids.shape[1] - max(1, first_target))


@torch.no_grad()
def test_the_loss_is_that_of_transformers_on_the_answers(model: PreTrainedModel) -> None:
    loss = answer_loss(model, whole(EXAMPLES))
    torch.testing.assert_close(loss, sum(stock_loss(model, example, len(example.context)) for example in EXAMPLES))


@torch.no_grad()
def test_the_loss_of_prompt_and_answer_is_that_of_transformers(model: PreTrainedModel) -> None:
    loss = answer_loss(model, whole(EXAMPLES, train_on_prompt=True))
    torch.testing.assert_close(loss, sum(stock_loss(model, example, 0) for example in EXAMPLES))


@torch.no_grad()
def test_padding_does_not_change_the_loss_of_an_example(model: PreTrainedModel) -> None:
    short, long = Encoded((5, 6, 7), (8,)), Encoded(tuple(range(1, 80)), (9, 10))
    alone, both, other = (answer_loss(model, whole(examples)) for examples in ([short], [short, long], [long]))
    beside = both - other
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_first_token_of_an_example_without_context_is_not_learned(model: PreTrainedModel) -> None:
    batch = whole([Encoded((), (5, 6, 7))])
    assert len(batch.targets) == 2
    loss = answer_loss(model, batch)
    torch.testing.assert_close(loss, stock_loss(model, Encoded((), (5, 6, 7)), 0))


@torch.no_grad()
def test_mean_loss_is_over_tokens_not_over_micro_batches(model: PreTrainedModel) -> None:
    batch = whole(EXAMPLES)
    expected = float(answer_loss(model, batch)) / len(batch.targets)
    for tokens in (1, 200, 2000):
        mean = mean_loss(model, EXAMPLES, PROTOCOL, budgets=replace(SMALL, scoring_tokens=tokens))
        assert mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_the_micro_batch_does_not_change_the_gradients(train_on_prompt: bool, adapted: PeftModel) -> None:
    examples = [*EXAMPLES[:7], Encoded((), (3, 4, 5))]
    for _, layer in sparse_lora_layers(adapted):
        nn.init.normal_(layer.factors()[1], std=0.02)
    found = []
    protocol = changed(train_on_prompt=train_on_prompt)
    for tokens in (2000, 150):
        loss = _accumulate_gradients(adapted.get_base_model(), examples, protocol, accelerator_for(), tokens)
        found.append((loss, [parameter.grad.clone() for parameter in trainable(adapted)]))
        adapted.zero_grad()
    (whole_loss, whole), (parts_loss, parts) = found
    expected = mean_loss(adapted.get_base_model(), examples, changed(train_on_prompt=train_on_prompt))
    assert (whole_loss, parts_loss) == pytest.approx((expected, expected), rel=1e-5)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-3)
    assert all(gradient.any() for gradient in whole)


def test_the_loss_falls_on_a_few_examples(adapted: PeftModel) -> None:
    steps = list(fitted(adapted, EXAMPLES[:8], changed(steps=20)))
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert steps[0].loss == pytest.approx(mean_loss(load_base(adapted), EXAMPLES[:8], PROTOCOL), rel=1e-5)


def load_base(adapted: PeftModel) -> PreTrainedModel:
    """The model before training: its adapters taken off."""
    return adapted.unload()  # type: ignore[no-any-return]


def test_a_step_says_what_it_did(adapted: PeftModel) -> None:
    steps = list(fitted(adapted, EXAMPLES[:8], PROTOCOL))
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.learning_rate for step in steps] == [learning_rate_at(step, PROTOCOL) for step in range(6)]
    assert {step.examples for step in steps} == {8}
    assert {step.tokens for step in steps} == {
        sum(len(example.context + example.continuation) for example in EXAMPLES[:8])
    }
    assert all(step.seconds > 0 for step in steps)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_training_repeats_to_the_last_bit(dropout: float, llama: Path) -> None:
    found = []
    for noise in (1, 2):
        model = load_model(llama, torch.float32, torch.device("cpu"))
        adapted = adapt_model(model, changed(lora_dropout=dropout), None, seed=0)
        torch.manual_seed(noise)
        losses = [step.loss for step in fitted(adapted, EXAMPLES, PROTOCOL, seed=5)]
        found.append((losses, [parameter.detach() for parameter in trainable(adapted)]))
    (first_losses, first), (second_losses, second) = found
    assert first_losses == second_losses
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_optimizer_is_adamw_on_clipped_gradients(llama: Path) -> None:
    protocol = changed(steps=4, global_batch_size=12, max_grad_norm=0.5, weight_decay=0.3)
    adapted = adapted_model(llama)
    list(fitted(adapted, EXAMPLES, protocol))

    manual = adapted_model(llama)
    parameters = trainable(manual)
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(4):
        batch = whole(EXAMPLES)
        gradients = torch.autograd.grad(answer_loss(manual.get_base_model(), batch) / len(batch.targets), parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 0.5, "or clipping is not tested"
        rate = learning_rate_at(step, protocol)
        for p, gradient, m, v in zip(parameters, gradients, means, squares, strict=True):
            g = gradient * 0.5 / norm
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g**2)
            p.data *= 1 - rate * 0.3
            p.data -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(trainable(adapted), parameters, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("ends", ["done", "closed", "failed"])
def test_the_model_is_in_training_mode_until_its_training_ends(ends: str, adapted: PeftModel) -> None:
    model = adapted.get_base_model()
    steps = fitted(adapted, EXAMPLES, PROTOCOL)
    for _ in range(2):
        next(steps)
        mean_loss(model, EXAMPLES, PROTOCOL)
        assert all(module.training for module in model.modules())
    if ends == "done":
        list(steps)
    elif ends == "closed":
        steps.close()
    else:
        trainable(adapted)[0].data.fill_(math.nan)
        with pytest.raises(RunError):
            next(steps)
    assert not any(module.training for module in model.modules())


def test_the_eval_loss_has_no_dropout(llama: Path) -> None:
    model = load_model(llama, torch.float32, torch.device("cpu"))
    adapted = adapt_model(model, changed(lora_dropout=0.5), None, seed=0)
    nn.init.normal_(next(sparse_lora_layers(adapted))[1].factors()[1])
    expected = mean_loss(model, EXAMPLES, PROTOCOL)
    assert mean_loss(model.train(), EXAMPLES, PROTOCOL) == expected


def test_a_loss_that_is_not_finite_names_its_step(adapted: PeftModel) -> None:
    next(sparse_lora_layers(adapted))[1].factors()[1].data.fill_(math.inf)
    with pytest.raises(RunError, match=r"got nan at step 1 with learning rate 0\.01 \(no good loss before\)\. Lower"):
        list(fitted(adapted, EXAMPLES, PROTOCOL))


def test_a_diverging_training_stops_at_the_first_bad_loss(adapted: PeftModel) -> None:
    protocol = changed(learning_rate=1e30, final_learning_rate=0.0)
    steps = fitted(adapted, EXAMPLES, protocol)
    first = next(steps).loss
    assert math.isfinite(first)
    with pytest.raises(RunError, match=rf"got nan at step 2 with .* \(last good loss {first:.4g} at step 1\)\. Lower"):
        next(steps)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_computing_activations_again_changes_no_bit(dropout: float, llama: Path) -> None:
    found = []
    for again in (False, True):
        protocol, budgets = changed(lora_dropout=dropout, steps=3), replace(SMALL, activation_checkpointing=again)
        adapted = adapt_model(load_model(llama, torch.float32, torch.device("cpu")), protocol, None, seed=0)
        losses = [step.loss for step in fitted(adapted, EXAMPLES, protocol, budgets=budgets)]
        found.append((losses, [parameter.detach() for parameter in trainable(adapted)]))
        assert not adapted.get_base_model().is_activation_checkpointing
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_checkpointed_activations_are_not_kept(llama: Path) -> None:
    kept = []
    for again in (False, True):
        adapted = adapted_model(llama)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            next(fitted(adapted, EXAMPLES, PROTOCOL, budgets=replace(SMALL, activation_checkpointing=again)))
        kept.append(sum(sizes))
    assert kept[1] < 0.2 * kept[0]


def test_a_packed_training_learns_the_same(llama: Path) -> None:
    plain, together = (
        [
            step.loss
            for step in fitted(
                adapted_model(llama), EXAMPLES, changed(packing=packing, max_tokens=200, max_new_tokens=1)
            )
        ]
        for packing in (False, True)
    )
    assert together == pytest.approx(plain, rel=1e-3)


def test_a_token_of_a_packed_sequence_sees_its_own_example_up_to_itself() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert packed_mask(positions, None).int().tolist() == [seen]
    seen[2] = [0, 1, 1, 0, 0]
    assert packed_mask(positions, window=2).int().tolist() == [seen]


def test_packed_attention_is_that_of_transformers(model: PreTrainedModel) -> None:
    positions = torch.tensor([[*range(30), *range(9), *range(5)], [*range(20), *range(20), *[0] * 4]])
    ids = torch.arange(88).view(2, 44) + 7
    mask = packed_mask(positions, getattr(model.config, "sliding_window", None))[:, None]
    with torch.no_grad():
        ours, theirs = (
            model(ids, position_ids=positions, attention_mask=given, use_cache=False).logits for given in (mask, None)
        )
    assert torch.equal(ours, theirs)


def test_a_training_that_goes_on_takes_the_examples_that_are_left(llama: Path) -> None:
    adapted = adapted_model(llama)
    optimizer = adamw(trainable(adapted), PROTOCOL)
    first = [
        step.step
        for step in itertools.islice(fit(adapted.get_base_model(), optimizer, EXAMPLES, PROTOCOL, 0, budgets=SMALL), 2)
    ]
    rest = list(fit(adapted.get_base_model(), optimizer, EXAMPLES, PROTOCOL, 0, done=2, budgets=SMALL))
    assert first + [step.step for step in rest] == [1, 2, 3, 4, 5, 6]
    assert [step.learning_rate for step in rest] == [learning_rate_at(step, PROTOCOL) for step in range(2, 6)]
    whole = list(fitted(adapted_model(llama), EXAMPLES, PROTOCOL))
    assert [step.loss for step in rest] == [step.loss for step in whole[2:]]


def test_a_worker_goes_from_one_precision_to_another() -> None:
    for precision in ("no", "bf16", "no"):
        assert accelerator_for(precision).mixed_precision == precision
