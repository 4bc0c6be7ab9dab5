"""What a 7B costs on a GPU: `python tests/bench_gpu.py` or `make bench-gpu`, at most nine minutes on an H100.

It needs neither an installation nor Ray, MLflow, Optuna or data: from the source tree, on Python 3.11 or 3.12, with
torch, transformers, peft, accelerate, safetensors and what these bring.

- cells: one of each LoRA mode, half of the weights pruned by magnitude, on random weights of Llama-2-7B's shapes that
  are written to --work-dir first (13.5 GB): seconds and peak memory of every stage beside the forecast of
  tune_sparse/evaluation/memory.py, and tokens a second of training, beside plain LoRA in stock PEFT.
- layers: forward and backward of one layer, as in bench_lora.
- generation, scoring: rates.

The figures of a part are in its own JSON file in --output as soon as they are known; a line of JSON with all of them
comes last. What would not end in --minutes is left out and named. masked-finetuning is not among the cells: its float32
weights, gradients and moments take 104 GB at this size.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_parts import Bench, Measure

PARTS = ("cells", "layers", "generation", "scoring")


def main(arguments: Sequence[str] | None = None) -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the source tree, which need not be installed
    options = _parser().parse_args(arguments)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as trials have it
    import torch

    if not torch.cuda.is_available() and not options.smoke:
        print("bench_gpu needs a GPU, torch sees none. --smoke runs tiny shapes on a CPU.", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=options.work_dir) as folder:
        figures = _measure_all(options, Path(folder))
    print(json.dumps(figures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_names, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path("bench-gpu"), help="folder for the JSON of each part")
    parser.add_argument(
        "--work-dir", type=Path, help="folder with room for the checkpoint; default: that of the system"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing is begun that would not end in them")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too: shows that it runs")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"parts are {', '.join(PARTS)}, got {', '.join(unknown)}")
    return names


def _measure_all(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    from gpu_parts import SEVEN_B, SMOKE, Bench, parts
    from random_inputs import write_checkpoint

    from tune_sparse.files import write_json

    ends = time.monotonic() + 60 * options.minutes
    setting = SMOKE if options.smoke else SEVEN_B
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"machine": _machine(device)}
    started = time.perf_counter()
    written = write_checkpoint(setting.config(), folder / "model", setting.dtype, device)
    figures["checkpoint"] = {"bytes": written, "seconds": time.perf_counter() - started}
    bench = Bench(setting, folder / "model", device)
    for part, items in parts(setting).items():
        if part not in options.parts:
            continue
        figures[part] = {}
        for name, (measure, seconds) in items.items():
            left = ends - time.monotonic()
            if left < (0 if options.smoke else seconds):
                found: dict[str, Any] = {"left_out": f"may take {seconds:.0f} s, {max(left, 0):.0f} s are left"}
            else:
                found = _measured(measure, bench)
            figures[part][name] = found
            print(f"{part}: {name}: {json.dumps(found)}", flush=True)
            write_json(options.output / f"{part}.json", {"machine": figures["machine"], part: figures[part]})
    return figures


def _measured(measure: Measure, bench: Bench) -> dict[str, Any]:
    """One failure leaves the others: a GPU is not at hand every day."""
    import torch

    try:
        return measure(bench)
    except (torch.OutOfMemoryError, RuntimeError, AssertionError) as error:
        found = {"failed": f"{type(error).__name__}: {error}"}
    bench.forget()
    gc.collect()
    return found


def _machine(device: Any) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    packages = ("torch", "transformers", "peft", "accelerate")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    if device.type == "cpu":
        return versions | {"device": "cpu"}
    found = torch.cuda.get_device_properties(device)
    return versions | {"device": found.name, "memory_bytes": found.total_memory, "cuda": torch.version.cuda}


if __name__ == "__main__":
    sys.exit(main())
