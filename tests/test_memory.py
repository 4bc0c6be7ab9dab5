"""The memory formula against what is counted, and the budgets that follow from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)

from tune_sparse.config import Protocol
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError, TooLargeError
from tune_sparse.evaluation.card_budgets import budgets_for, scoring_budgets, smallest_budgets, usable
from tune_sparse.evaluation.memory import GIB, CellMemory
from tune_sparse.lora.layer import adapt_model
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.other_weights import all_weights
from tune_sparse.modes import ADAPTER_MODES, MODES, SPARSE_ADAPTER_MODES
from tune_sparse.pruning.calibration import ModelBlocks, calibrate_blockwise
from tune_sparse.pruning.methods import METHODS
from tune_sparse.training.budgets import Budgets

LLAMA_7B = ModelDims(4096, 32, 32, 32, 128, 11008, 32000, None, 4096)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
CONFIGS = {
    "LlamaForCausalLM": LlamaConfig(**SMALL, intermediate_size=192, num_key_value_heads=2),
    "MistralForCausalLM": MistralConfig(
        **SMALL, intermediate_size=128, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "MixtralForCausalLM": MixtralConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, num_local_experts=3),
}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)


def gpt2_or_opt(name: str, hidden: int, channels: int, layers: int = 2) -> PreTrainedConfig:
    if name == "GPT2LMHeadModel":
        sizes = {"n_embd": hidden, "n_inner": channels, "n_layer": layers, "n_head": 4, "vocab_size": 96}
        return GPT2Config(**sizes, **NO_TOKENS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    sizes = {"hidden_size": hidden, "ffn_dim": channels, "num_hidden_layers": layers, "num_attention_heads": 4}
    return OPTConfig(**sizes, **NO_TOKENS, word_embed_proj_dim=hidden, vocab_size=96, dropout=0.0)


CARD_24, CARD_80, CARD_141 = 24 * GIB, int(79.6 * GIB), int(139.8 * GIB)


def dims_of(config: PreTrainedConfig, name: str) -> ModelDims:
    config.architectures = [name]
    return ModelDims.from_config(config)


def cell(mode: str = "sparse-to-sparse", method: str = "unstructured", **settings: object) -> CellMemory:
    return CellMemory(LLAMA_7B, mode, method, Protocol(**settings))  # type: ignore[arg-type]


def without_activations(cell: CellMemory) -> dict[str, int]:
    """The stages with the smallest budgets, less what grows with tokens and vocabulary."""
    budgets = smallest_budgets(cell)
    stages = cell.stages(budgets)
    growing = {
        "train": budgets.micro_batch_tokens * cell.activation_bytes(True),
        "score": cell.scoring(budgets),
    }
    if METHODS[cell.method].needs.gradients:
        growing["prune"] = cell.longest * (cell.saved_bytes + cell.backward_bytes)
    elif METHODS[cell.method].is_calibrated:
        growing["prune"] = cell.calibrated_activations
    return {stage: needed - growing.get(stage, 0) for stage, needed in stages.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_weights_are_those_of_the_class(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert all_weights(dims_of(CONFIGS[name], name)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", SPARSE_ADAPTER_MODES)
def test_a_lora_cell_of_7b_holds_one_copy_of_its_weights(mode: str, method: str) -> None:
    found = cell(mode, method)
    for stage, needed in without_activations(found).items():
        assert found.weights <= needed <= 1.25 * found.weights, stage


def test_a_step_of_8192_tokens_fits_its_card() -> None:
    for keeps, checkpointing, limit in ((False, True, 22e9), (False, False, 75e9), (True, False, 75e9)):
        budgets = Budgets(8192, 2048, 2048, checkpointing, keeps)
        assert cell().stages(budgets)["train"] <= limit


def test_the_notes_have_the_same_activations_at_7b() -> None:
    """5.5 MB a token; with checkpointing 0.26 that are kept, and one block."""
    assert cell().activation_bytes(False) == pytest.approx(5.5e6, rel=0.02)
    assert cell().activation_bytes(True) == pytest.approx(262_144 + 5.4e6 / 32, rel=0.25)


def test_masked_finetuning_holds_float32_weights_gradients_and_moments() -> None:
    found = cell("masked-finetuning")
    budgets = smallest_budgets(found)
    states = (16 - 2 + 2) * found.prunable
    assert found.stages(budgets)["train"] - found.weights - found.masks - states < 5 * GIB
    assert found.peak(budgets) > 8.5 * found.weights


def test_schedules_take_a_twentieth_beside_weights_gradients_and_moments() -> None:
    """Whatever the schedule: bits of masks and their history, and one matrix that is dropped and grown."""
    found = CellMemory(LLAMA_7B, "masked-finetuning", "unstructured", Protocol(precision="float32"))
    others = found.weights - 4 * found.prunable
    assert found.masks + found.mask_update - others <= 1.05 * (16 * found.prunable + found.masks)
    assert cell("sparse-to-sparse").mask_update == 0


def test_a_structured_cell_trains_without_what_its_masks_cut_out() -> None:
    small, budgets = (
        replace(cell("sparse-to-sparse", "structured"), sparsity=0.5),
        Budgets(8192, 2048, 2048, True, False),
    )
    assert small.in_training.prunable == pytest.approx(0.5 * small.prunable, rel=0.01)
    whole, density = cell("sparse-to-dense", "structured").stages(budgets), small.stages(budgets)
    assert whole["train"] - density["train"] > 0.5 * small.element * small.prunable
    assert {name: bytes_ for name, bytes_ in whole.items() if name != "train"} == {
        name: bytes_ for name, bytes_ in density.items() if name != "train"
    }
    masked = replace(small, protocol=Protocol(masked_lora_impl="effective-weight"))
    assert masked.in_training == masked


@pytest.mark.parametrize("mode", ["sparse-to-sparse", "masked-finetuning"])
def test_the_loss_between_two_steps_fits_too(mode: str) -> None:
    """It reads as many tokens at once as scoring does, with the moments in memory."""
    found = cell(mode)
    for card in (CARD_24, CARD_80, 2 * CARD_80):
        if found.peak(smallest_budgets(found)) <= usable(card):
            budgets = budgets_for(card, 1.0, found)
            assert found.masks + found.selection_loss(budgets) <= usable(card)
            assert found.peak(budgets) <= usable(card)


@pytest.mark.parametrize("sequential", [False, True])
def test_calibration_keeps_one_activation_of_each_example(sequential: bool) -> None:
    config = LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=4)
    dims = dims_of(config, "LlamaForCausalLM")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.requires_grad_(False)
    examples = [Encoded(tuple(range(30)), tuple(range(20)))] * 100
    with LiveBytes(*model.parameters()) as live:
        before = live.bytes
        for _ in calibrate_blockwise(ModelBlocks(model), examples, sequential=sequential):
            pass
    protocol = Protocol(calibration_tokens=50 * len(examples), calibration_window=50)
    forecast = CellMemory(dims, "sparse-to-dense", "wanda", protocol).calibrated_activations
    assert live.peak - before == pytest.approx(forecast, rel=0.15)


def count_saved(model: torch.nn.Module, tokens: int) -> int:
    """Bytes of the storages that autograd saves of the decoder, but for what does not grow with the tokens."""
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.get_base_model().base_model(input_ids=torch.zeros(2, tokens // 2, dtype=torch.long), use_cache=False)  # type: ignore[operator]
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", SPARSE_ADAPTER_MODES)
@pytest.mark.parametrize("sizes", [(64, 192, 4, 2), (128, 160, 4, 4)])
def test_the_saved_activations_of_a_block_are_those_counted(
    mode: str, precision: str, sizes: tuple[int, int, int, int]
) -> None:
    hidden, channels, heads, groups = sizes
    protocol = Protocol(lora_rank=2, precision=precision)

    def saved_a_token(layers: int) -> float:
        config = LlamaConfig(hidden_size=hidden, intermediate_size=channels, num_attention_heads=heads,
                             num_key_value_heads=groups, num_hidden_layers=layers, vocab_size=96)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision), attn_implementation="sdpa")
        model.requires_grad_(False)
        weights = prunable_weights(model)
        masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.mul_(masks[name])
        adapted = adapt_model(model, protocol, masks if MODES[mode].masks_update else None, seed=0)
        return (count_saved(adapted, 128) - count_saved(adapted, 64)) / 64

    config = LlamaConfig(hidden_size=hidden, intermediate_size=channels, num_attention_heads=heads,
                         num_key_value_heads=groups, num_hidden_layers=1)  # fmt: skip
    expected = CellMemory(dims_of(config, "LlamaForCausalLM"), mode, "unstructured", protocol).saved_bytes
    assert saved_a_token(2) - saved_a_token(1) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("mode", SPARSE_ADAPTER_MODES)
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OPTForCausalLM"])
def test_the_activations_of_gpt2_and_opt_are_those_counted(name: str, mode: str) -> None:
    """What is saved, exactly; with the backward, and in a pass without gradients, at most 1.4 times what is needed."""
    hidden, channels, protocol = 128, 512, Protocol(lora_rank=2)
    forecast = CellMemory(dims_of(gpt2_or_opt(name, hidden, channels), name), mode, "unstructured", protocol)

    def adapted(layers: int) -> torch.nn.Module:
        config = gpt2_or_opt(name, hidden, channels, layers)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(model).items()}
        masked = masks if MODES[mode].masks_update else None
        return adapt_model(
            model.requires_grad_(False), replace(protocol, masked_lora_impl="effective-weight"), masked, 0
        )

    def peak(model: torch.nn.Module, tokens: int, is_training: bool) -> int:
        plain = model.get_base_model()  # type: ignore[operator]
        with LiveBytes(*plain.parameters()) as live, torch.set_grad_enabled(is_training):
            before, ids = live.bytes, torch.zeros(2, tokens // 2, dtype=torch.long)
            hidden = plain.base_model(input_ids=ids, use_cache=False).last_hidden_state
            if is_training:
                hidden.sum().backward()
        plain.zero_grad()
        return live.peak - before

    one, two = adapted(1), adapted(2)
    saved = [(count_saved(model, 128) - count_saved(model, 64)) / 64 for model in (one, two)]
    assert saved[1] - saved[0] == pytest.approx(forecast.saved_bytes / 2, rel=0.001)
    for is_training, expected in ((True, forecast.activation_bytes(False)), (False, forecast.pass_bytes)):
        measured = (peak(two, 512, is_training) - peak(two, 256, is_training)) / 256
        assert measured <= expected <= 1.4 * measured


def test_budgets_at_7b_by_card() -> None:
    """24 GB compute activations again; 80 GB keep them, and W_eff for the step; dense cells have no W_eff."""
    cards, protocol = (CARD_24, CARD_80), Protocol()
    small, large = (
        budgets_for(card, 1.0, CellMemory(LLAMA_7B, "sparse-to-sparse", "wanda", protocol)) for card in cards
    )
    assert (small.activation_checkpointing, small.keeps_effective_weights) == (True, False)
    assert (large.activation_checkpointing, large.keeps_effective_weights) == (False, True)
    assert small.micro_batch_tokens == large.micro_batch_tokens == 8192
    assert 90_000 < large.generation_tokens < 110_000
    dense = budgets_for(CARD_80, 1.0, CellMemory(LLAMA_7B, "dense", "none", Protocol()))
    assert not dense.keeps_effective_weights


@given(
    card=st.integers(20 * GIB, 200 * GIB),
    more=st.integers(0, 100 * GIB),
    mode=st.sampled_from(ADAPTER_MODES),
    method=st.sampled_from(["unstructured", "wanda", "sparsegpt"]),
    max_tokens=st.sampled_from([64, 512, 2048, 4096]),
)
def test_budgets_fit_and_grow_with_the_card(card: int, more: int, mode: str, method: str, max_tokens: int) -> None:
    protocol = Protocol(max_tokens=max_tokens, max_new_tokens=32)
    found = CellMemory(LLAMA_7B, mode, method, protocol)
    try:
        small = budgets_for(card, 1.0, CellMemory(LLAMA_7B, mode, method, protocol))
    except TooLargeError:
        assert found.peak(smallest_budgets(found)) > usable(card)
        return
    large = budgets_for(card + more, 1.0, CellMemory(LLAMA_7B, mode, method, protocol))
    assert found.peak(small) <= usable(card)
    assert found.peak(large) <= usable(card + more)
    assert small.micro_batch_tokens >= max_tokens
    assert large.scoring_tokens >= small.scoring_tokens
    assert large.generation_tokens >= small.generation_tokens
    assert small.activation_checkpointing or not large.activation_checkpointing


def test_a_share_of_a_card_has_a_share_of_its_memory() -> None:
    half = budgets_for(CARD_80, 0.5, CellMemory(LLAMA_7B, "sparse-to-dense", "unstructured", Protocol()))
    assert half == budgets_for(CARD_80 // 2, 1.0, CellMemory(LLAMA_7B, "sparse-to-dense", "unstructured", Protocol()))


@pytest.mark.parametrize(
    ("mode", "method", "share", "settings", "message"),
    [
        ("sparse-to-sparse", "unstructured", 0.5, {}, r"needs 18\.\d GB \(stage train\), .*Raise --gpus-per-trial"),
        (
            "sparse-to-sparse",
            "unstructured",
            1.0,
            {"precision": "float32"},
            r"it has 25\.8 GB\. Set precision=bfloat16",
        ),
        ("sparse-to-sparse", "taylor", 1.0, {}, r"\(stage prune\), .*Set calibration_window=512\."),
        ("masked-finetuning", "unstructured", 1.0, {}, r"needs 12\d\.\d GB .* Leave out the mode masked-finetuning"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    mode: str, method: str, share: float, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(TooLargeError, match=message) as caught:
        budgets_for(CARD_24, share, CellMemory(LLAMA_7B, mode, method, Protocol(**settings)))  # type: ignore[arg-type]
    assert isinstance(caught.value, InputError)
    if "max_tokens" in message:
        assert budgets_for(CARD_24, share, CellMemory(LLAMA_7B, mode, method, Protocol(max_tokens=1024)))


def test_masked_finetuning_of_7b_fits_the_largest_card_alone() -> None:
    with pytest.raises(TooLargeError):
        budgets_for(CARD_80, 1.0, CellMemory(LLAMA_7B, "masked-finetuning", "unstructured", Protocol()))
    assert budgets_for(CARD_141, 1.0, CellMemory(LLAMA_7B, "masked-finetuning", "unstructured", Protocol()))


def test_a_packed_sequence_has_a_mask() -> None:
    plain, packed = cell(), cell(packing=True)
    budgets = Budgets(4096, 4096, 4096, True, False)
    assert packed.training(budgets) - plain.training(budgets) == 4096 * 2048 * 3


def test_a_model_that_is_too_large_for_any_setting_names_a_larger_card() -> None:
    with pytest.raises(TooLargeError, match=r"Take a larger card\.$"):
        budgets_for(4 * GIB, 1.0, CellMemory(replace(LLAMA_7B, num_layers=80), "sparse-to-dense", "random", Protocol()))


def test_a_model_that_is_only_scored_needs_no_room_for_a_training() -> None:
    card, cell = 16 * GIB, CellMemory(LLAMA_7B, "dense", "none", Protocol())
    with pytest.raises(TooLargeError, match="stage"):
        budgets_for(card, 1.0, cell)
    found = scoring_budgets(card, 1.0, LLAMA_7B, Protocol())
    assert cell.weights + cell.scoring(found) <= usable(card)
    assert found.scoring_tokens >= cell.longest
    whole, alone = budgets_for(CARD_80, 1.0, cell), scoring_budgets(CARD_80, 1.0, LLAMA_7B, Protocol())
    assert alone.scoring_tokens == whole.scoring_tokens
    assert alone.generation_tokens >= whole.generation_tokens
    with pytest.raises(TooLargeError, match=r"to score it: in bfloat16 1\d\.\d GB, it has room for 8\.\d\. Take"):
        scoring_budgets(card, 0.6, LLAMA_7B, Protocol())


def test_masks_that_change_have_a_history_on_the_host_and_in_checkpoints() -> None:
    """The step since which a weight is zero: 8 bits of 200 steps, 6.5 GB of a host at 7B."""
    fixed, changing = (
        CellMemory(LLAMA_7B, "masked-finetuning", "unstructured", Protocol(), 0.5, name) for name in ("one-shot", "set")
    )
    budgets = budgets_for(CARD_141, 1.0, fixed)
    assert changing.stages(budgets) == fixed.stages(budgets)
    history = Protocol().steps.bit_length() * fixed.masks
    assert history == pytest.approx(6.5e9, rel=0.1)
    assert changing.host_bytes(budgets, on_gpu=True) == fixed.host_bytes(budgets, on_gpu=True) + history
    assert changing.checkpoint_bytes == fixed.checkpoint_bytes + 2 * (history + fixed.masks)
