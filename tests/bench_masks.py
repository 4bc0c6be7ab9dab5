"""What pruning costs: `python tests/bench_masks.py` (a table, then one JSON line; `--smoke`: small
matrices). One thread, process CPU time.

Both sides of a ratio run in turns; medians of three or more.

- levels: nine levels of a 4096 x 4096 bf16 matrix, magnitude, in one pass, against sorting and comparing once a
  level, and against one sort. Goals: at least 80 and 8 times faster, no count error, artefact at most 1/17.
- wanda: nine levels of a 4096 x 4096 fp32 matrix against sorting the rows once a level. Goal: at least 8.
- sparsegpt: the inner loop on 4096 x 4096 fp32 against the loop of the paper's algorithm, both with the same exact
  counts. Goal: at least 3, masks equal up to 1e-5 of the entries, the same error.
- slice: `prune` of a checkpoint of four blocks with the shapes of a 7B Llama in bf16, packed levels, against reading
  its files from disk; peak memory of the process. Goal: at most 4 times the read, at most three times the largest
  tensor and 500 MB.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks import bench_parser
from safetensors.torch import save_file
from torch import Tensor

from tune_sparse.pruning.masks import pruned_count
from tune_sparse.pruning.sparsegpt import BLOCK, inverse_factor, sparsegpt
from tune_sparse.pruning.survival_map import pack, row_survival_map, survival_map

SPARSITIES = [round(0.1 * level, 1) for level in range(1, 10)]
LAYERS_7B = 32


@dataclass(frozen=True)
class Sizes:
    """Of the matrices, and of the checkpoint of four blocks."""

    matrix: int = 4096
    hidden: int = 4096
    channels: int = 11008
    vocabulary: int = 32000


SMOKE = Sizes(256, 128, 256, 512)


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def medians(sides: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """Median CPU seconds of each side, the sides in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(cpu_seconds(side))
    return {name: statistics.median(values) for name, values in seconds.items()}


def gaussian(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def sort_and_compare(scores: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The usual way: a threshold from a sort of the whole matrix, once a level."""
    masks = []
    for count in counts:
        threshold = scores.flatten().sort().values[count]
        masks.append(scores > threshold)
    return masks


def bench_levels(sizes: Sizes) -> dict[str, float]:
    weight = gaussian(sizes.matrix, torch.bfloat16)
    counts = [pruned_count(weight.numel(), sparsity) for sparsity in SPARSITIES]
    seconds = medians(
        {
            "ours": lambda: pack(survival_map(weight.abs(), counts)),
            "one sort": lambda: weight.abs().flatten().sort(),
            "nine sorts": lambda: sort_and_compare(weight.abs(), counts),
        }
    )
    levels = survival_map(weight.abs(), counts)
    usual = sort_and_compare(weight.abs(), counts)
    return {
        "levels_seconds": seconds["ours"],
        "levels_speedup_over_nine_sorts": seconds["nine sorts"] / seconds["ours"],
        "levels_speedup_over_one_sort": seconds["one sort"] / seconds["ours"],
        "levels_count_errors": sum(abs(int((levels <= k).sum()) - count) for k, count in enumerate(counts)),
        "usual_count_errors": sum(abs(int((~mask).sum()) - c) for mask, c in zip(usual, counts, strict=True)),
        "levels_artefact_fraction": pack(levels).numel() / (len(counts) * weight.numel()),
    }


def sort_rows_each_level(scores: Tensor, sparsities: Sequence[float]) -> list[Tensor]:
    """As Wanda's own code: the rows sorted, and the lowest indices scattered, once a level."""
    masks = []
    for sparsity in sparsities:
        pruned = torch.zeros_like(scores, dtype=torch.bool)
        order = scores.sort(dim=-1, stable=True).indices
        masks.append(~pruned.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True))
    return masks


def bench_wanda(sizes: Sizes) -> dict[str, float]:
    scores, width = gaussian(sizes.matrix, torch.float32).abs(), sizes.matrix
    sparsities = [pruned_count(width, sparsity) / width for sparsity in SPARSITIES]
    counts = [round(sparsity * scores.numel()) for sparsity in sparsities]
    ours = row_survival_map(scores, counts)
    usual = sort_rows_each_level(scores, sparsities)
    seconds = medians(
        {
            "ours": lambda: row_survival_map(scores, counts),
            "nine sorts": lambda: sort_rows_each_level(scores, sparsities),
        },
    )
    return {
        "wanda_seconds": seconds["ours"],
        "wanda_speedup": seconds["nine sorts"] / seconds["ours"],
        "wanda_masks_equal": all(torch.equal(ours > level, mask) for level, mask in enumerate(usual)),
    }


def plain_sparsegpt(weight: Tensor, factor: Tensor, pruned: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper, column after column, with exact counts a block of columns."""
    weight, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    width = weight.shape[1]
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        block, errors = weight[:, start:stop].clone(), torch.zeros(len(weight), stop - start)
        own = factor[start:stop, start:stop]
        scores = block**2 / own.diagonal().reshape(1, -1) ** 2
        share = pruned * stop // width - pruned * start // width
        lowest = scores.flatten().sort(stable=True).indices[:share]
        mask = torch.ones(scores.numel(), dtype=torch.bool).index_fill_(0, lowest, False).view(scores.shape)
        for i in range(stop - start):
            column = block[:, i]
            kept = column * mask[:, i]
            error = (column - kept) / own[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(own[i, i:].unsqueeze(0))
            block[:, i] = kept
            errors[:, i] = error
        weight[:, start:stop], keep[:, start:stop] = block, mask
        weight[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return weight, keep


def bench_sparsegpt(sizes: Sizes) -> dict[str, float]:
    size, generator = sizes.matrix, torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    # A few strong directions on top of noise, as the inputs of a language model's layers have.
    strong = torch.randn(2 * size, 8, generator=generator) @ torch.randn(8, size, generator=generator)
    x = torch.randn(2 * size, size, generator=generator) + 2 * strong
    hessian = x.T @ x / len(x)
    factor, pruned = inverse_factor(hessian), size * size // 2
    made: dict[str, tuple[Tensor, Tensor]] = {}
    seconds = medians(
        {
            "ours": lambda: made.update(ours=sparsegpt(weight, factor, pruned)),
            "plain": lambda: made.update(plain=plain_sparsegpt(weight, factor, pruned)),
        },
    )

    def error(pruned: Tensor) -> float:
        difference = pruned - weight
        return float(((difference @ hessian) * difference).sum())

    return {
        "sparsegpt_seconds": seconds["ours"],
        "sparsegpt_speedup": seconds["plain"] / seconds["ours"],
        "sparsegpt_masks_differ_fraction": float((made["ours"][1] != made["plain"][1]).float().mean()),
        "sparsegpt_error_ratio": error(made["ours"][0]) / error(made["plain"][0]),
    }


def write_llama(folder: Path, layers: int, hidden: int, channels: int, vocabulary: int) -> None:
    """A checkpoint of random weights without a tokenizer, a shard a block."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": channels,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    parts = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
    parts |= {
        "mlp.gate_proj": (channels, hidden),
        "mlp.up_proj": (channels, hidden),
        "mlp.down_proj": (hidden, channels),
    }
    shards = [dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))]
    shards += [{f"model.layers.{n}.{part}.weight": size for part, size in parts.items()} for n in range(layers)]
    names: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}, folder / file)
        names |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read from disk."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path) -> float:
    start, buffer = time.perf_counter(), bytearray(1 << 24)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def prune_slice(scratch: str, method: str, queue: Any) -> None:
    """In a process of its own, so that its peak memory is that of pruning. A small model first: imports, figures."""
    from trainables.peak_memory import PeakMemory
    from tune_sparse.pruning.prune_checkpoint import Request, run

    def seconds(name: str) -> tuple[float, float]:
        folder = Path(scratch) / name
        forget(folder)
        start = time.perf_counter(), time.process_time()
        run(Request(str(folder), [method], SPARSITIES, Path(scratch) / "masks", format="levels"), lambda line: None)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    seconds("small")
    fixed = seconds("small")
    with closing(PeakMemory()) as memory:
        memory.end("before")
        took = seconds("slice")
        memory.end("slice")
    queue.put((took, fixed, memory.by_stage["slice"], memory.by_stage["before"]))


def bench_slice(sizes: Sizes) -> dict[str, float]:
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as scratch:
        folder = Path(scratch) / "slice"
        write_llama(folder, 4, sizes.hidden, sizes.channels, sizes.vocabulary)
        write_llama(Path(scratch) / "small", layers=1, hidden=64, channels=128, vocabulary=64)
        context = multiprocessing.get_context("spawn")
        for method in ("unstructured", "random", "structured"):
            forget(folder)
            read = read_seconds(folder)
            queue = context.Queue()
            worker = context.Process(target=prune_slice, args=(scratch, method, queue))
            worker.start()
            (seconds, cpu_seconds), (fixed, fixed_cpu), peak, before = queue.get()
            worker.join()
            figures |= {
                f"{method}_seconds": seconds - fixed,
                f"{method}_cpu_seconds": cpu_seconds - fixed_cpu,
                f"{method}_fixed_seconds": fixed,
                f"{method}_read_seconds": read,
                f"{method}_over_read": (seconds - fixed) / read,
                f"{method}_cpu_over_read": (cpu_seconds - fixed_cpu) / read,
                f"{method}_7b_minutes": ((seconds - fixed) * LAYERS_7B / 4 + fixed) / 60,
                f"{method}_peak_mb": peak / 1e6,
                f"{method}_idle_mb": before / 1e6,
            }
        figures["slice_gb"] = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        figures["slice_largest_tensor_mb"] = sizes.vocabulary * sizes.hidden * 2 / 1e6
    return figures


BENCHES = {"levels": bench_levels, "wanda": bench_wanda, "sparsegpt": bench_sparsegpt, "slice": bench_slice}


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("benches", nargs="*", default=list(BENCHES), metavar="BENCH", help=", ".join(BENCHES))
    torch.set_num_threads(1)
    chosen, figures = parser.parse_args(), dict[str, float]()
    for name in chosen.benches:
        figures |= BENCHES[name](SMOKE if chosen.smoke else Sizes())
    for name, value in figures.items():
        print(f"{name:36} {value:.5g}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
