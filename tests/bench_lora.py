"""What masked LoRA costs: `python tests/bench_lora.py` (tables, then one JSON line; ten minutes on one core, or with
`--smoke` seconds for small layers).

Process CPU seconds on one thread, medians over interleaved repeats after a warm-up, forward and backward, R = 16.

- SparsePEFT: y = xWᵀ + x(s(BA)⊙(W != 0))ᵀ, by plain autograd (Munoz et al. 2024, arXiv:2410.03750, section 3).
- LoRA: the layer of the installed peft, adapters in the dtype of the weight.
- ours: the implementation named in the table. Goals stand beside the ratios; on a GPU, `--device cuda` prints the
  same tables.
- ours_structured: heads and channels masked, so trained on the model without them; a step of 205M weights in float32.

With `--model 7b` a whole training step of a 7B-shaped model of random weights is measured instead.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import bench_parser
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from plain_masks import make_masks
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tune_sparse.config import Protocol
from tune_sparse.lora.compact_training import find_cuts, shrink_into
from tune_sparse.lora.layer import SparseLora, adapt_model
from tune_sparse.lora.masked_linear import Workspace, choose_impl
from tune_sparse.models.architectures import ARCHITECTURES
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.bit_masks import BitMasks

RANK, SCALING = 16, 2.0


@dataclass(frozen=True)
class Sizes:
    """Of a layer, of the stack of layers whose memory is counted, and of the model that takes a step."""

    width: int = 4096
    tokens: tuple[int, ...] = (128, 512, 1024)
    stack_width: int = 2048
    step_tokens: tuple[int, ...] = (512, 1024)
    model: Mapping[str, int] = field(default_factory=dict)


SMOKE = Sizes(128, (16,), 128, (16,), {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2})


class SparsePeft(PeftLinear):
    """SparsePEFT's layer: its dense product keeps a mask (one byte a weight) and an update (two) for the backward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        A, B, weight = self.lora_A["default"].weight, self.lora_B["default"].weight, self.base_layer.weight
        update = (B @ A) * self.scaling["default"]
        update = update * (weight != 0)
        y = self.base_layer(x)
        return (y + F.linear(x.to(update.dtype), update)).to(y.dtype)


class Ours(nn.Module):
    """One of our implementations with its factors."""

    def __init__(self, weight: Tensor, mask: Tensor | None, impl: str) -> None:
        super().__init__()
        self.weight, self.impl = weight, choose_impl(weight, mask, RANK, Workspace(), impl)
        self.A = nn.Parameter(torch.randn(RANK, weight.shape[1], device=weight.device) / 64)
        self.B = nn.Parameter(torch.randn(weight.shape[0], RANK, device=weight.device) / 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.impl(x, self.weight, None, self.A, self.B, SCALING)


def peft_layer(kind: type[PeftLinear], weight: Tensor) -> PeftLinear:
    """A peft layer on a frozen weight, its adapters in the same dtype."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    layer = kind(base, "default", config=LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK)), r=RANK, lora_alpha=32)
    nn.init.normal_(layer.lora_B["default"].weight, std=1 / 64)
    return layer.to(weight.device, weight.dtype)


def seconds(contenders: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """The median of each, interleaved: what disturbs one disturbs all."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            _wait(device)
            start = clock()
            run()
            _wait(device)
            if repeat:
                taken[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_step(layer: nn.Module, x: Tensor, dY: Tensor) -> Callable[[], None]:
    """Forward and backward, the input's gradient too."""

    def run() -> None:
        layer(x).backward(dY)
        x.grad = None
        layer.zero_grad()

    return run


def pruned(width: int, dtype: torch.dtype, density: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weight, mask) of width x width."""
    mask = torch.rand(width, width, device=device) < density
    return (torch.randn(width, width, device=device) / 64 * mask).to(dtype), mask


def layer_row(
    width: int, dtype: torch.dtype, tokens: int, impl: str, density: float, repeats: int, device: torch.device
) -> dict[str, Any]:
    weight, mask = pruned(width, dtype, density, device)
    x = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    dY = torch.randn(tokens, width, device=device).to(dtype)
    layers = {
        "sparse_peft": peft_layer(SparsePeft, weight),
        "lora": peft_layer(PeftLinear, weight),
        "ours": Ours(weight, mask, impl),
        "gemm": None,
    }
    contenders: dict[str, Callable[[], Any]] = {name: make_step(la, x, dY) for name, la in layers.items() if la}
    contenders["gemm"] = lambda: F.linear(dY, weight)
    taken = seconds(contenders, repeats, device)
    return {"dtype": str(dtype)[6:], "tokens": tokens, "impl": impl, "density": density} | taken


def print_layers(rows: list[dict[str, Any]], goals: dict[Any, tuple[float | None, float | None]]) -> None:
    print(
        f"\n{'impl':17}{'dtype':9} density tokens | SparsePEFT   LoRA   ours   GEMM ms | "
        "/ SparsePEFT goal | / LoRA goal"
    )
    for row in rows:
        peft_goal, lora_goal = goals.get((row["impl"], row["dtype"], row["tokens"]), (None, None))
        row |= {"of_sparse_peft": row["ours"] / row["sparse_peft"], "of_lora": row["ours"] / row["lora"]}
        times = "".join(f"{1e3 * row[name]:7.0f}" for name in ("sparse_peft", "lora", "ours", "gemm"))
        shown = [f"{goal:.2f}" if goal else "   -" for goal in (peft_goal, lora_goal)]
        print(
            f"{row['impl']:17}{row['dtype']:9} {row['density']:7.2f} {row['tokens']:6} |   {times}    "
            f"| {row['of_sparse_peft']:12.2f} {shown[0]} | {row['of_lora']:6.2f} {shown[1]}"
        )


LAYER_GOALS: dict[Any, tuple[float | None, float | None]] = {
    ("effective-weight", "bfloat16", 128): (0.25, None),
    ("effective-weight", "bfloat16", 512): (0.50, 1.9),
    ("effective-weight", "bfloat16", 1024): (0.45, 1.6),
    ("effective-weight", "float32", 512): (0.55, 1.9),
    ("effective-weight", "float32", 1024): (0.55, 1.6),
}


def saved_bytes(forward: Callable[[], Any], held: Iterable[Tensor]) -> int:
    """What a forward pass keeps for the backward, besides what is held anyway; each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _result = forward()  # freed after the count: a storage freed before could be counted as another
    return sum(kept.values())


def stack_bytes(layers: list[nn.Module], x: Tensor) -> int:
    """What a forward pass through `layers`, one after the other, keeps for the backward."""
    held = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    held += [layer.weight for layer in layers if isinstance(layer, Ours)]
    return saved_bytes(lambda: nn.Sequential(*layers)(x), held)


def memory(width: int, device: torch.device) -> dict[str, float]:
    """MiB saved for backward by 12 layers of width x width in bfloat16 at 1,024 tokens."""
    mask = torch.rand(width, width, device=device) < 0.5
    weights = [(torch.randn(width, width, device=device) * mask).bfloat16() for _ in range(12)]
    x = torch.randn(1024, width, device=device).bfloat16().requires_grad_()
    found = {
        "sparse_peft": stack_bytes([peft_layer(SparsePeft, w) for w in weights], x),
        "lora": stack_bytes([peft_layer(PeftLinear, w) for w in weights], x),
        "ours": stack_bytes([Ours(w, mask, "effective-weight") for w in weights], x),
    }
    return {name: size / 2**20 for name, size in found.items()}


def small_llama(
    dtype: torch.dtype, device: torch.device, structured: bool, density: float = 0.5, **changes: Any
) -> tuple[LlamaForCausalLM, BitMasks]:
    """A pruned Llama of random weights, 4 layers and 1,024 wide unless changed, and its masks."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
    config = LlamaConfig(**{**sizes, "vocab_size": 4096, "max_position_embeddings": 8192, **changes})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config).requires_grad_(False)
    torch.set_default_dtype(before)
    weights = prunable_weights(model)
    if structured:
        found = make_masks("structured", weights, ModelDims.from_config(config), 1 - density, seed=0)
        masks = BitMasks.pack(found.items())
    else:
        masks = BitMasks.pack((name, torch.rand(w.shape, device=device) < density) for name, w in weights.items())
    for name, weight in weights.items():
        weight.mul_(masks[name])
    return model, masks


CONTENDERS = {
    "sparse_peft": "SparsePEFT, its adapters in the dtype of the weights",
    "sparse_peft_fp32_adapters": "SparsePEFT",
    "lora": "dense LoRA in stock peft",
    "ours": "sparse-to-sparse, single weights masked",
    "ours_structured": "sparse-to-sparse, heads and channels masked",
}


def contender(name: str, dtype: torch.dtype, device: torch.device, density: float = 0.5, **sizes: Any) -> nn.Module:
    """A model ready to train, and what its name says: ours with our layers and none of peft's own, or the reverse."""
    model, masks = small_llama(dtype, device, name == "ours_structured", density, **sizes)
    if not name.startswith("ours"):
        adapted = peft_model(model, PeftLinear if name == "lora" else SparsePeft, name != "sparse_peft")
    else:
        adapted = adapt_model(model, Protocol(lora_rank=RANK, lora_alpha=32.0), masks, seed=0)
        if name == "ours_structured":
            cuts = find_cuts(ModelDims.from_config(model.config), masks)
            assert cuts is not None
            shrink_into(adapted, cuts)
    check_layers(name, adapted, masks)
    return adapted


def check_layers(name: str, adapted: nn.Module, masks: BitMasks) -> None:
    """Assert that a contender computes with the layers that it is measured for."""
    layers = [module for module in adapted.modules() if isinstance(module, PeftLinear)]
    kind = {"lora": PeftLinear, "ours": SparseLora, "ours_structured": SparseLora}.get(name, SparsePeft)
    assert len(layers) == len(masks)
    assert {type(layer) for layer in layers} == {kind}
    if name == "ours":
        assert {layer.impl.name for layer in layers} == {"effective-weight"}
        assert all(layer.keep_mask is not None for layer in layers)
    if name == "ours_structured":
        assert sum(layer.base_layer.weight.numel() for layer in layers) == sum(masks.kept.values())


def peft_model(model: LlamaForCausalLM, kind: type[PeftLinear], fp32_adapters: bool) -> nn.Module:
    config = LoraConfig(
        r=RANK, lora_alpha=32, target_modules=list(ARCHITECTURES["LlamaForCausalLM"].modules), task_type="CAUSAL_LM"
    )
    config._register_custom_module({nn.Linear: kind})
    return get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)


def train_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    model.train()

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return run


def whole_step(tokens: int, repeats: int, device: torch.device, **sizes: Any) -> dict[str, float]:
    """Seconds of a training step in bfloat16, without the optimizer."""
    ids = torch.randint(0, 4096, (1, tokens), device=device)
    names = [name for name in CONTENDERS if name != "ours_structured"]
    steps = {name: train_step(contender(name, torch.bfloat16, device, **sizes), ids) for name in names}
    return seconds(steps, repeats, device)


def structured_steps(tokens: int, repeats: int, device: torch.device, **sizes: Any) -> dict[str, dict[str, float]]:
    """{contender and density: seconds of a step, MiB of weights and adapters, MiB saved for the backward}, float32."""
    cases = [("lora", 1.0), ("ours_structured", 0.8), ("ours_structured", 0.5), ("ours_structured", 0.2), ("ours", 0.5)]
    models = {f"{name} {d}": contender(name, torch.float32, device, d, **sizes) for name, d in cases}
    ids = torch.randint(0, 4096, (1, tokens), device=device)
    taken = seconds({name: train_step(model, ids) for name, model in models.items()}, repeats, device)
    rows = {}
    for name, model in models.items():
        held = [*model.parameters(), *model.buffers()]
        saved = saved_bytes(lambda model=model: model(input_ids=ids, labels=ids, use_cache=False).loss, held)
        mib = {"weights_mib": sum(tensor.nbytes for tensor in held) / 2**20, "saved_mib": saved / 2**20}
        rows[name] = {"seconds": taken[name]} | mib
    return rows


SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def seven_b(tokens: int, repeats: int, device: torch.device, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tokens per second and, on a GPU, peak GiB of a training step: sparse-to-sparse against dense LoRA."""
    rows = []
    for name in ("ours", "ours_structured", "lora"):
        adapted = contender(name, torch.bfloat16, device, vocab_size=32000, **sizes)
        ids = torch.randint(0, 32000, (1, tokens), device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = seconds({name: train_step(adapted, ids)}, repeats, device)[name]
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        rows.append({"model": name, "tokens": tokens, "tokens_per_second": tokens / taken, "peak_gib": peak})
        del adapted
        gc.collect()
    return rows


def main() -> None:
    options = bench_parser(__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--model", choices=["4x1024", "7b"], default="4x1024")
    parts = ["layers", "memory", "step", "structured"]
    options.add_argument("--only", choices=parts, nargs="+", default=parts)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    device, repeats, sizes = torch.device(chosen.device), chosen.repeats, SMOKE if chosen.smoke else Sizes()
    if chosen.model == "7b":
        lengths, model = ((16,), sizes.model) if chosen.smoke else ((1024, 2048, 4096), SEVEN_B)
        rows = [row for tokens in lengths for row in seven_b(tokens, repeats, device, model)]
        for row in rows:
            peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:7.1f} GiB"
            print(f"{row['model']:15} {row['tokens']:6} {row['tokens_per_second']:9.0f} /s {peak}")
        print(json.dumps(rows))
        return
    figures: dict[str, Any] = {}
    if "layers" in chosen.only:
        bf16, fp32 = torch.bfloat16, torch.float32
        cases = [(dtype, tokens, "effective-weight", 0.5) for dtype in (fp32, bf16) for tokens in sizes.tokens]
        figures["layers"] = [layer_row(sizes.width, *case, repeats, device) for case in cases]
        print_layers(figures["layers"], LAYER_GOALS)
    if "memory" in chosen.only:
        found = figures["saved_mib"] = memory(sizes.stack_width, device)
        print(f"\nMiB saved for backward, 12 layers of width {sizes.stack_width} in bfloat16, 1,024 tokens")
        print("  ".join(f"{name} {mib:.1f}" for name, mib in found.items()), end="; ")
        lora, peft = (found["ours"] / found[name] for name in ("lora", "sparse_peft"))
        print(f"ours / LoRA {lora:.2f} (goal 1.05), / SparsePEFT {peft:.2f} (goal 0.30)")
    if "step" in chosen.only:
        print("\nforward and backward of a 4 x 1024 Llama in bfloat16, half of the weights kept, seconds")
        figures["step"] = {}
        for tokens in sizes.step_tokens:
            taken = figures["step"][tokens] = whole_step(tokens, repeats, device, **sizes.model)
            ratios = {name: taken["ours"] / value for name, value in taken.items() if name != "ours"}
            print(f"{tokens} tokens: " + "  ".join(f"{name} {value:.2f}" for name, value in taken.items()))
            print("  ours / " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
        print("  goals: 0.65 of SparsePEFT, 0.30 with its fp32 adapters, 1.35 of LoRA from 1,024 tokens on")
    if "structured" in chosen.only:
        model = {"num_hidden_layers": 16, **sizes.model}
        rows = figures["structured"] = structured_steps(sizes.step_tokens[0], repeats, device, **model)
        print(f"\na step of {sizes.step_tokens[0]} tokens of a 16 x 1024 Llama in float32 (share of dense LoRA's)")
        for name, row in rows.items():
            ratios = {key: value / rows["lora 1.0"][key] for key, value in row.items()}
            print(f"{name:20}" + "  ".join(f"{key} {value:.2f} ({ratios[key]:.2f})" for key, value in row.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
